"""Random splits of the real images: what :class:`cmbench.metrics.floor.Floors` is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmbench.metrics.floor import Floors, Share
from cmbench.metrics.frechet import distance_of_rows
from cmbench.metrics.precision_recall import reference_radii, share_inside_others
from cmbench.seeds import derive_seed

#: Random splits into halves: many where covariances are small and a split costs milliseconds.
SPLITS, SPLITS_OF_FEW_FEATURES, FEW_FEATURES = 20, 100, 256
#: Most images of a half.
LARGEST_HALF = 25_000
#: Random subsets per count.
SUBSETS = 20
#: Fewest and most images of a random subset; a half counts even if it is smaller.
SMALLEST_SUBSET, LARGEST_SUBSET = 32, 5_000
#: Fewest real images that are split at all.
FEWEST = 10


def measure_floors(features: Tensor, radii: Tensor) -> Floors:
    """Return the floors of real images.

    Args:
        features: of the real images, ``[M, D]``, M >= 10.
        radii: :func:`reference_radii` of them.
    """
    splits = SPLITS if features.shape[1] > FEW_FEATURES else SPLITS_OF_FEW_FEATURES
    half = min(len(features) // 2, LARGEST_HALF)
    orders = (_order(len(features), "halves", s).to(features.device) for s in range(splits))
    found = [distance_of_rows(features[o[:half]], features[o[half : 2 * half]]) for o in orders]
    distances = torch.tensor(found, dtype=torch.float64)
    return Floors(
        splits=splits,
        half=half,
        distance=float(distances.mean()),
        distance_std=float(distances.std()),
        inside=_shares(features, radii),
    )


def _shares(features: Tensor, radii: Tensor) -> tuple[Share, ...]:
    found = [_share_of_subsets(features, count) for count in _counts(len(features))]
    whole = share_inside_others(features, radii)
    # All images are one set; their deviation follows from that of the largest subsets.
    spread = found[-1].std * math.sqrt(found[-1].count / (len(features) - 1))
    return (*found, Share(len(features) - 1, whole, spread, SUBSETS))


def _counts(images: int) -> list[int]:
    """Return the counts of others in random subsets, ascending."""
    halvings = [images // 2**i for i in range(1, images.bit_length())]
    able = [count for count in halvings if SMALLEST_SUBSET <= count < LARGEST_SUBSET]
    return able[::-1] or [images // 2]


def _share_of_subsets(features: Tensor, count: int) -> Share:
    found = []
    for subset in range(SUBSETS):
        order = _order(len(features), f"subset of {count}", subset)[: count + 1]
        rows = features[order.to(features.device)]
        found.append(share_inside_others(rows, reference_radii(rows)))
    shares = torch.tensor(found, dtype=torch.float64)
    # Subsets of one set overlap, which makes them too equal by the usual finite-population factor.
    fresh = math.sqrt(1 - (count + 1) / len(features))
    return Share(count, float(shares.mean()), float(shares.std()) / fresh, SUBSETS)


def _order(count: int, name: str, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(number, name))
    return torch.randperm(count, generator=generator)
