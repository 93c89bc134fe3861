"""A census of images: statistics of their pixels, without any network.

An extractor turns a wrong range, swapped channels or a repeated image into features without any
error. The census keeps, in one pass, a hash of every image and a few numbers per channel; comparing
that of the samples with that of the real images reveals such mistakes.
"""

from __future__ import annotations

import math
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
#: Share of the real images' roughness below which samples look resized or blurred.
SMOOTH = 0.75
#: Rise of the differences across the 8-pixel grid that looks like JPEG, above the real images'.
BLOCKING = 0.04
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
    """Pixel statistics of a set of images.

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
    #: Mean |second difference| of neighbouring pixels over the mean |first|; 0 if unknown. Noise
    #: has 1.7, photographs about 1; enlarged images less than they had.
    roughness: float = 0.0
    #: Mean |first difference| across the borders of 8x8 blocks (JPEG's) over that inside them; 0
    #: if unknown.
    blocking: float = 0.0

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
        self._steps = torch.zeros(3, 2, dtype=torch.float64)

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
        self._steps += _steps(images)

    def result(self) -> Census:
        """Return the census so far."""
        hashes = torch.cat(self._hashes) if self._hashes else torch.zeros(0, dtype=torch.int64)
        if self._sums is None:
            return Census(hashes, shape=self._shape)
        mean = self._sums[0] / self._sums[2]
        variance = (self._sums[1] / self._sums[2] - mean.square()).clamp(min=0)
        share = 1 / max(len(hashes), 1)
        border, inside, bend = (self._steps[:, 0] / self._steps[:, 1].clamp(min=1)).tolist()
        blocks = inside > 0 and min(self._shape[1:]) >= 16
        return Census(
            hashes,
            mean,
            variance.sqrt(),
            self._low,
            self._high,
            self._grey * share,
            self._flat * share,
            self._shape,
            roughness=bend / inside if blocks else 0.0,
            blocking=border / inside if blocks else 0.0,
        )


def _steps(images: Tensor) -> Tensor:
    """Return sums and numbers of |first differences| across 8x8 blocks and inside, and |second|."""
    found = torch.zeros(3, 2, dtype=torch.float64)
    for axis in (2, 3):
        if images.shape[axis] < 3:
            continue
        steps = images.short().diff(dim=axis)
        bends = steps.diff(dim=axis).abs_()
        sums = steps.abs_().sum((0, 1, 5 - axis), dtype=torch.int64).double().cpu()
        border = torch.arange(len(sums)) % 8 == 7
        each = steps.numel() // len(sums)
        for row, chosen in enumerate((border, ~border)):
            found[row, 0] += sums[chosen].sum()
            found[row, 1] += each * int(chosen.sum())
        found[2, 0] += int(bends.sum(dtype=torch.int64))
        found[2, 1] += bends.numel()
    return found


def census_warnings(samples: Census, real: Census | None) -> list[str]:
    """Return warnings about the samples, alone and compared with the real images."""
    found = []
    if samples.duplicates:
        found.append(
            f"{samples.duplicates} of {samples.count} samples are duplicates: check the seeds and"
            " how samples were divided among processes"
        )
    if samples.flat > 0.01:
        found.append(f"{samples.flat:.0%} of the samples have one colour: the generator failed")
    if real is None:
        return found + _range_warnings(samples)
    shared = samples.shared_with(real)
    if shared:
        found.append(
            f"{shared} of {samples.count} samples equal a reference image pixel by pixel: real"
            " images among the samples, a train/test mix-up, or memorisation"
        )
    if samples.mean is not None and real.mean is not None and len(samples.mean) == len(real.mean):
        found += _colour_warnings(samples, real, samples.mean, real.mean)
    if samples.shape == real.shape:
        found += _texture_warnings(samples, real)
    return found


def _texture_warnings(samples: Census, real: Census) -> list[str]:
    """Return signs that files were resized or JPEG-compressed before they were stored."""
    found = []
    if samples.roughness and samples.roughness < SMOOTH * real.roughness:
        found.append(
            f"the samples are smooth (roughness {samples.roughness:.2f}, real images"
            f" {real.roughness:.2f}): resized or blurred? score them as they were generated"
        )
    # Chance alone moves the ratio by about 1 / sqrt(blocks).
    blocks = math.prod(samples.shape[1:]) * samples.count / 64
    chance = 3 / math.sqrt(max(blocks, 1))
    if real.blocking and samples.blocking > real.blocking + max(BLOCKING, chance):
        found.append(
            f"differences across the 8-pixel grid are {samples.blocking:.2f} times those inside it"
            f" ({real.blocking:.2f} in the real images): JPEG-compressed or enlarged before"
            " they were stored?"
        )
    return found


def _range_warnings(samples: Census) -> list[str]:
    """Return signs of a wrong range that need no real images beside them."""
    if samples.mean is None:
        return []
    if samples.high - samples.low <= 2:
        return [
            f"all pixels of the samples lie in {samples.low} … {samples.high}: images in [0, 1] or"
            " [-1, 1] were stored as bytes; scale them to 0 … 255"
        ]
    if samples.low >= 120:
        return [
            f"no pixel of the samples is below {samples.low}: a generator that is hardly trained,"
            " or images in [0, 1] taken for [-1, 1]?"
        ]
    return []


def _colour_warnings(samples: Census, real: Census, mean: Tensor, real_mean: Tensor) -> list[str]:
    found = []
    if samples.high - samples.low <= 2 and real.high - real.low > 2:
        return _range_warnings(samples)
    worst = float((mean - real_mean).abs().max())
    if worst > MEAN_TOLERANCE:
        found.append(
            f"a channel's mean differs by {worst:.0f} of 255 levels from the real images': a"
            " generator that is hardly trained, or a wrong range ([0, 1] taken for [-1, 1])?"
        )
    if real.low < 64 and samples.low >= 120:
        found += _range_warnings(samples)
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
    """Return warnings about the class labels that samples were asked for.

    Args:
        counts: samples per label.
        expected: real images per class; labels should follow these frequencies.
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
