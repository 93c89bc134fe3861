"""The kernel distance over random subsets, as torch-fidelity draws them: an independent oracle."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (xᵀy / D + 1)³ for all pairs ``[N, M]``."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance_of_subsets(
    samples: Tensor, reference: Tensor, subsets: int, subset_size: int, seed: int = 2020
) -> tuple[float, float]:
    """Return mean and population standard deviation over subsets (``RandomState(seed)``)."""
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = samples[random.choice(len(samples), subset_size, replace=False)].double()
        y = reference[random.choice(len(reference), subset_size, replace=False)].double()
        kxx, kyy, kxy = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
        pairs = subset_size * (subset_size - 1)
        within = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / pairs
        values.append(float(within - 2 * kxy.mean()))
    return float(np.mean(values)), float(np.std(values))
