"""Nearest real neighbours of samples: a flag for memorised training images, not a proof.

A generator that has learnt the distribution is as near to images it never saw as to those it was
trained on; one that copies is nearer to the latter. With as many held-out as training images, the
share of samples whose nearest real image is a training image should be one half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.census import Census
from cmbench.metrics.precision import exact_float32, row_blocks
from cmbench.metrics.precision_recall import BLOCK, squared_distances
from cmbench.records.record import CopyCount
from cmbench.seeds import derive_seed

#: Share of the distance to the second nearest real image at which a sample is a near copy.
NEAR = 1 / 3
#: In fewer dimensions the nearest of several neighbours is often much nearer by chance.
FEWEST_DIMENSIONS = 16
#: Samples and real images that are examined for near copies.
EXAMINED = 2000
Copies = dict[Literal["pixels", "features"], CopyCount]
_KINDS = {"pixels": "exact copies", "features": "near copies"}
#: Standard errors above one half at which the share is called suspicious.
SUSPICIOUS = 4.0


@dataclass(frozen=True)
class Memorisation:
    """Where samples' nearest real images lie.

    Args:
        train_share: share of samples nearer to a training than to a held-out image; 0.5 is ideal.
        standard_error: of ``train_share``, were it 0.5.
        distance_ratio: median of (distance to the nearest training image) / (to the nearest
            held-out image); about 1 is ideal.
        nearest: (sample, training image, distance) of the ten closest pairs.
        compared: training and held-out images compared with, each.
        held_out_sha256: of the held-out images' content, where they come from a file.
    """

    train_share: float
    standard_error: float
    distance_ratio: float
    nearest: tuple[tuple[int, int, float], ...]
    compared: int
    held_out_sha256: str = ""

    @property
    def suspicious(self) -> bool:
        """Whether samples are nearer to the training set than chance allows."""
        return self.train_share > 0.5 + SUSPICIOUS * self.standard_error

    @property
    def reversed(self) -> bool:
        """Whether samples are nearer to the held-out images than chance allows."""
        return self.train_share < 0.5 - SUSPICIOUS * self.standard_error


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Compare the nearest training and held-out neighbours of ``samples`` ``[N, D]``.

    ``train`` and ``held_out`` are features of one extractor; the larger set is thinned at random to
    the size of the smaller, since more images lie nearer by themselves.
    """
    if min(len(samples), len(train), len(held_out)) < 2:
        raise UserError(
            "memorisation",
            f"{len(samples)} samples, {len(train)} training and {len(held_out)} held-out images",
            allowed="at least 2 of each",
        )
    count = min(len(train), len(held_out))
    kept, other = _thin(train, count, "train"), _thin(held_out, count, "held out")
    centre = train.double().mean(0)
    rows = (samples.double() - centre).float()
    near_train, which = _nearest(rows, (train[kept].double() - centre).float())
    near_other, _ = _nearest(rows, (held_out[other].double() - centre).float())
    ratio = (near_train / near_other.clamp_min(1e-30)).sqrt().median()
    ties = (near_train == near_other).double().mean() / 2
    order = near_train.argsort()[:10]
    return Memorisation(
        train_share=float((near_train < near_other).double().mean() + ties),
        standard_error=0.5 / math.sqrt(len(samples)),
        distance_ratio=float(ratio),
        nearest=tuple(_pair(samples, train, int(i), int(kept[which[i]])) for i in order),
        compared=count,
    )


def find_copies(
    samples: Census, real: Census | None, rows: Tensor | None, real_rows: Tensor | None
) -> Copies:
    """Count copies of real images by pixels and by features ``[N, D]``, where both are known."""
    found: Copies = {}
    if real is not None and real.shape == samples.shape:
        found["pixels"] = pixel_copies(samples, real)
    if rows is None or real_rows is None or len(real_rows) < 3:
        return found
    if rows.shape[1] >= FEWEST_DIMENSIONS:
        found["features"] = feature_copies(rows, real_rows.to(rows.device))
    return found


def copy_warnings(found: Copies) -> list[str]:
    """Return a warning for each count that is significantly above that of held-out images."""
    return [
        f"{count.copies} of {count.samples} samples are {_KINDS[kind]} of real images, where"
        f" {count.held_out_copies} of {count.held_out} held-out real images are: never ranked"
        for kind, count in found.items()
        if count.significant
    ]


def pixel_copies(samples: Census, real: Census) -> CopyCount:
    """Count samples that equal a real image, and real images that equal another one."""
    _, which, times = torch.unique(real.hashes, return_inverse=True, return_counts=True)
    return CopyCount(
        samples=samples.count,
        copies=samples.shared_with(real),
        held_out=real.count,
        held_out_copies=int((times[which] > 1).sum()),
    )


def feature_copies(samples: Tensor, real: Tensor) -> CopyCount:
    """Count near copies among samples ``[N, D]`` and among real images ``[M, D]``, M > 2.

    A near copy is at most :data:`NEAR` times as far from its nearest real image as from the second
    nearest (Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to
    memorize"): unlike a distance alone, this does not suspect samples that are merely typical. The
    first :data:`EXAMINED` samples and as many random real images are examined.
    """
    held_out, asked = _thin(real, min(EXAMINED, len(real)), "copies"), samples[:EXAMINED]
    return CopyCount(
        samples=len(asked),
        copies=_near_copies(asked, real),
        held_out=len(held_out),
        held_out_copies=_near_copies(real[held_out], real, held_out),
    )


def _near_copies(asked: Tensor, real: Tensor, own: Tensor | None = None) -> int:
    """Return how many rows are near copies of a row of ``real``; ``own`` are not compared.

    Memory is that of two blocks: there may be a million real images.
    """
    found, centre = 0, real.mean(0, dtype=torch.float64).float()
    with exact_float32():
        for first in range(0, len(asked), BLOCK):
            part = asked[first : first + BLOCK].float() - centre
            nearest = part.new_full((len(part), 2), torch.inf)
            for start in range(0, len(real), BLOCK):
                distances = squared_distances(part, real[start : start + BLOCK].float() - centre)
                if own is not None:
                    columns = own[first : first + BLOCK] - start
                    here = ((columns >= 0) & (columns < distances.shape[1])).nonzero()[:, 0]
                    distances[here, columns[here]] = torch.inf
                both = torch.cat([nearest, distances], 1)
                nearest = both.topk(2, dim=1, largest=False).values
            found += int((nearest[:, 0] <= NEAR**2 * nearest[:, 1]).sum())
    return found


def _pair(samples: Tensor, train: Tensor, sample: int, image: int) -> tuple[int, int, float]:
    """Return a pair with its distance, subtracted: products lose the digits of near copies."""
    distance = (samples[sample].double() - train[image].double()).norm()
    return sample, image, float(distance)


def _thin(rows: Tensor, count: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(0, "memorisation", name))
    return torch.randperm(len(rows), generator=generator)[:count].to(rows.device)


def _nearest(rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distance to the nearest row of ``real``, and its number."""
    distances, numbers = [], []
    with exact_float32():
        for part in row_blocks(rows, BLOCK):
            best = part.new_full((len(part),), torch.inf)
            where = torch.zeros(len(part), dtype=torch.int64, device=part.device)
            for start in range(0, len(real), BLOCK):
                values, index = squared_distances(part, real[start : start + BLOCK]).min(1)
                nearer = values < best
                best = torch.where(nearer, values, best)
                where = torch.where(nearer, index + start, where)
            distances.append(best)
            numbers.append(where)
    return torch.cat(distances), torch.cat(numbers)
