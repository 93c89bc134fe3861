"""Whether one row is better than another: paired t tests over seeds, with Holm's correction.

Cells with one sampling seed start from the same noise, so two rows are compared seed by seed and
what the noise does to both cancels. Rows that share fewer than two seeds are compared as
independent ones (Welch's test). Both are two-sided and give what ``scipy.stats.ttest_rel`` and
``ttest_ind`` give; importing ``scipy.stats`` takes longer than rendering a page.

A single seed cannot be compared. Differences that are all equal have no t statistic, and two or
three seeds that agree to the last digit prove little: their p-value is that of the exact sign test,
2^(1-n). Rows that are equal in every seed (a tie) have p = 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import stdtr, stdtrit

from cmbench.leaderboard.statistics import CONFIDENCE, Unit, cluster_means

#: Standard errors below this share of the mean are rounding of floats: no spread.
NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Difference:
    """Mean difference a - b of two rows with its interval and two-sided p-value.

    ``pairs`` is the number of paired seeds; 0 means that the rows share no seeds and their means
    were compared as independent ones.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def pair_units(a: Sequence[Unit], b: Sequence[Unit]) -> list[float]:
    """Return the differences a - b of paired seeds, one per independent seed; maybe empty.

    Cells pair by (training seed, sampling seed); if fewer than two pair so (an imported checkpoint
    has no training seed of ours), by sampling seed, means over trainings.
    """
    first = {(u.training_seed, u.sampling_seed): u.value for u in a}
    second = {(u.training_seed, u.sampling_seed): u.value for u in b}
    shared = [Unit(t, s, first[t, s] - second[t, s]) for t, s in first if (t, s) in second]
    if shared:
        differences = cluster_means(shared)
        if len(differences) > 1:
            return differences
    means_a, means_b = _by_sampling_seed(a), _by_sampling_seed(b)
    return [means_a[s] - means_b[s] for s in means_a if s in means_b]


def _by_sampling_seed(units: Sequence[Unit]) -> dict[int, float]:
    values: dict[int, list[float]] = defaultdict(list)
    for unit in units:
        values[unit.sampling_seed].append(unit.value)
    return {seed: math.fsum(found) / len(found) for seed, found in values.items()}


def compare_units(a: Sequence[Unit], b: Sequence[Unit]) -> Difference | None:
    """Compare two rows' units; None if either side has too few seeds."""
    differences = pair_units(a, b)
    n = pairs = len(differences)
    if pairs > 1:
        mean, error = _mean_and_error(differences)
        degrees = float(n - 1)
    else:
        first, second = cluster_means(a), cluster_means(b)
        n, pairs = min(len(first), len(second)), 0
        if n < 2:
            return None
        (mean_a, error_a), (mean_b, error_b) = _mean_and_error(first), _mean_and_error(second)
        mean, error = mean_a - mean_b, math.hypot(error_a, error_b)
        parts = error_a**4 / (len(first) - 1) + error_b**4 / (len(second) - 1)
        degrees = error**4 / parts if parts > 0 else float(n - 1)
    if error <= NO_SPREAD * abs(mean):
        p = 2.0 ** (1 - n) if mean != 0 else 1.0
        reach = 0.0 if p > 1 - CONFIDENCE else mean  # the interval holds 0 unless p is small
        return Difference(mean, min(mean, reach), max(mean, reach), p, pairs)
    p = 2 * float(stdtr(degrees, -abs(mean) / error))
    half = float(stdtrit(degrees, 0.5 + CONFIDENCE / 2)) * error
    return Difference(mean, mean - half, mean + half, p, pairs)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, of at least two values."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (S. Holm 1979), in the order given.

    Adjusted values at most alpha are significant with a family-wise error of at most alpha.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    steps = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted[order] = np.maximum.accumulate(steps)
    return list(adjusted.tolist())


def pairwise_p(groups: Sequence[Sequence[Unit]]) -> dict[tuple[int, int], float]:
    """Return the p-value of every pair i < j that can be compared; ``groups`` are rows' units."""
    found = {
        (i, j): compare_units(groups[i], groups[j]) for i, j in combinations(range(len(groups)), 2)
    }
    return {pair: difference.p for pair, difference in found.items() if difference is not None}
