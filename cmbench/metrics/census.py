"""A census of images: what their pixels say before any network looks at them.

An extractor turns a wrong range, swapped channels or a repeated image into features without a
murmur. The census keeps, in one pass, a hash of every image and a few numbers a channel; comparing
that of the samples with that of the real images makes such mistakes speak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmbench.metrics.precision import row_blocks
from cmbench.seeds import derive_seed

#: Brightness levels (of 255) by which a channel's mean may differ before the range is doubted.
MEAN_TOLERANCE = 45.0
#: Levels by which swapped channels must fit better before the order is doubted.
SWAP_MARGIN = 6.0
#: Standard deviations by which a class count may miss its share before it is called imbalance.
IMBALANCE = 6.0


def image_hashes(images: Tensor) -> Tensor:
    """Return a 64-bit hash of each image ``[N, …]`` (uint8 or float), int64 ``[N]``, exact.

    Integer arithmetic modulo 2^64 with random odd weights: equal images give equal hashes on any
    device and in any batch, different ones differ but for a chance of about 2^-60.
    """
    if images.dtype != torch.uint8:
        images = images.contiguous().to(torch.float32).view(torch.int32)
    rows = images.flatten(1)
    generator = torch.Generator().manual_seed(derive_seed("image hashes"))
    weights = torch.randint(
        -(2**62), 2**62, (rows.shape[1],), generator=generator, dtype=torch.int64
    )
    weights = (2 * weights + 1).to(rows.device)
    return torch.cat([(block.long() * weights).sum(1) for block in row_blocks(rows, 256)])


@dataclass(frozen=True, eq=False)
class Census:
    """What is known of a set of images.

    ``hashes`` int64 ``[N]``; ``mean`` and ``std`` ``[C]`` over all pixels of a channel, in levels
    of 0 … 255; ``low`` and ``high`` the extreme pixels; ``grey`` and ``flat`` the share of images
    whose channels are all equal, or that have one colour. All but the hashes are None for floats.
    """

    hashes: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    low: int = 0
    high: int = 255
    grey: float = 0.0
    flat: float = 0.0
    #: Channels, height, width; empty where there was no image.
    shape: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.hashes)

    @property
    def duplicates(self) -> int:
        """Images that equal an earlier one, pixel by pixel."""
        return self.count - len(torch.unique(self.hashes))

    def shared_with(self, other: Census) -> int:
        """Return how many of these images are, pixel by pixel, among the other's."""
        return int(torch.isin(self.hashes, other.hashes.to(self.hashes.device)).sum())


class CensusTaker:
    """Collects a census batch by batch; batches may come in any order."""

    def __init__(self) -> None:
        self._hashes: list[Tensor] = []
        self._sums: Tensor | None = None
        self._low, self._high = 255, 0
        self._grey = self._flat = 0
        self._shape: tuple[int, ...] = ()

    def update(self, images: Tensor) -> None:
        """Add ``[N, C, H, W]``; only uint8 images give more than hashes."""
        self._hashes.append(image_hashes(images).cpu())
        self._shape = tuple(images.shape[1:])
        if images.dtype != torch.uint8 or not len(images):
            return
        values = images.double()
        # Sums of bytes and of their squares are exact in float64: no order, no cancellation.
        pixels = torch.full((images.shape[1],), images[:, 0].numel(), dtype=torch.float64)
        sums = torch.stack(
            [values.sum((0, 2, 3)).cpu(), values.square().sum((0, 2, 3)).cpu(), pixels]
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._low = min(self._low, int(images.min()))
        self._high = max(self._high, int(images.max()))
        if images.shape[1] > 1:
            self._grey += int((images == images[:, :1]).flatten(1).all(1).sum())
        self._flat += int((images == images[:, :, :1, :1]).flatten(1).all(1).sum())

    def merge(self, other: CensusTaker) -> None:
        """Add another process's images."""
        self._hashes.extend(other._hashes)
        self._shape = self._shape or other._shape
        if other._sums is not None:
            self._sums = other._sums if self._sums is None else self._sums + other._sums
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        self._grey += other._grey
        self._flat += other._flat

    def result(self) -> Census:
        """Return the census so far."""
        hashes = torch.cat(self._hashes) if self._hashes else torch.zeros(0, dtype=torch.int64)
        if self._sums is None:
            return Census(hashes, shape=self._shape)
        mean = self._sums[0] / self._sums[2]
        variance = (self._sums[1] / self._sums[2] - mean.square()).clamp(min=0)
        share = 1 / max(len(hashes), 1)
        return Census(
            hashes, mean, variance.sqrt(), self._low, self._high,
            self._grey * share, self._flat * share, self._shape,
        )  # fmt: skip


def census_warnings(samples: Census, real: Census | None) -> list[str]:
    """Return what looks wrong about the samples, alone and beside the real images."""
    found = []
    if samples.duplicates:
        found.append(
            f"{samples.duplicates} of {samples.count} samples are duplicates: check the seeds and"
            " how samples were divided among processes"
        )
    if samples.flat > 0.01:
        found.append(f"{samples.flat:.0%} of the samples have one colour: the generator failed")
    if real is None:
        return found
    shared = samples.shared_with(real)
    if shared:
        found.append(
            f"{shared} of {samples.count} samples equal a reference image pixel by pixel: real"
            " images among the samples, a train/test mix-up, or memorisation"
        )
    if samples.mean is not None and real.mean is not None and len(samples.mean) == len(real.mean):
        found += _colour_warnings(samples, real, samples.mean, real.mean)
    return found


def _colour_warnings(samples: Census, real: Census, mean: Tensor, real_mean: Tensor) -> list[str]:
    found = []
    if samples.high - samples.low <= 2 and real.high - real.low > 2:
        return [
            f"all pixels of the samples lie in {samples.low} … {samples.high}: images in [0, 1] or"
            " [-1, 1] were stored as bytes; scale them to 0 … 255"
        ]
    worst = float((mean - real_mean).abs().max())
    if worst > MEAN_TOLERANCE:
        found.append(
            f"a channel's mean differs by {worst:.0f} of 255 levels from the real images': the"
            " range may be wrong ([0, 1] taken for [-1, 1], or the reverse)"
        )
    if real.low < 64 and samples.low >= 120:
        found.append(
            f"no pixel of the samples is below {samples.low}: images in [0, 1] were likely taken"
            " for [-1, 1]"
        )
    if len(mean) == 3:
        straight = float((mean - real_mean).abs().sum())
        swapped = float((mean.flip(0) - real_mean).abs().sum())
        if straight > 2 * swapped + SWAP_MARGIN:
            found.append(
                "the channel means fit the real images better in reverse order: BGR taken for RGB?"
            )
    if samples.grey > 0.5 and real.grey < 0.1:
        found.append(f"{samples.grey:.0%} of the samples are grey, {real.grey:.0%} of the reals")
    return found


def class_warnings(counts: Mapping[int, int], expected: Sequence[int]) -> list[str]:
    """Return what looks wrong about the class labels that samples were asked for.

    Args:
        counts: samples a label.
        expected: real images a class; labels should follow these frequencies.
    """
    total = sum(counts.values())
    if not total or not expected:
        return []
    unknown = sorted(label for label in counts if not 0 <= label < len(expected))
    if unknown:
        return [f"labels {unknown[:5]} are none of the {len(expected)} classes"]
    shares = torch.tensor(expected, dtype=torch.float64) / sum(expected)
    found = torch.tensor([counts.get(i, 0) for i in range(len(expected))], dtype=torch.float64)
    missing = int(((found == 0) & (shares * total >= 20)).sum())
    if missing:
        return [
            f"{missing} of {len(expected)} classes have no sample: draw labels from all classes"
        ]
    # Standard deviations of a class count, were the labels drawn from the frequencies.
    spread = (shares * (1 - shares) * total).sqrt().clamp_min(1.0)
    worst = int(((found - shares * total).abs() / spread).argmax())
    if float((found - shares * total).abs()[worst] / spread[worst]) > IMBALANCE:
        return [
            f"class {worst} has {int(found[worst])} of {total} samples where the data suggest"
            f" {float(shares[worst] * total):.0f}: draw labels from the class frequencies"
        ]
    return []
