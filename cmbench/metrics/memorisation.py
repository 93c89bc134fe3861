"""Nearest real neighbours of samples: a flag for memorised training images, not a proof.

A generator that has learnt the distribution is as near to images it never saw as to those it was
trained on; one that copies is nearer to the latter. With as many held-out as training images, the
share of samples whose nearest real image is a training image should be one half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.precision import exact_float32, row_blocks
from cmbench.metrics.precision_recall import BLOCK, squared_distances
from cmbench.seeds import derive_seed

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
    """

    train_share: float
    standard_error: float
    distance_ratio: float
    nearest: tuple[tuple[int, int, float], ...]
    compared: int

    @property
    def suspicious(self) -> bool:
        """Whether samples are nearer to the training set than chance allows."""
        return self.train_share > 0.5 + SUSPICIOUS * self.standard_error


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
