"""Whether one row is better than another: t tests over seeds, with Holm's correction.

Cells with one sampling seed start from the same noise, so two rows are compared seed by seed and
what the noise does to both cancels. Rows that share fewer than two seeds are compared as
independent ones (Welch's test), each with the noise of its own. The tests give what
``scipy.stats.ttest_rel`` and ``ttest_ind`` give; importing ``scipy.stats`` takes longer than
rendering a page.

A single seed cannot be compared. Differences that are all equal have no t statistic, and two or
three seeds that agree to the last digit prove little: their p-value is that of the exact sign test,
2^(1-n) of both sides. Rows that are equal in every seed (a tie) have p = 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit

from cmbench.leaderboard.statistics import Unit, cluster_means, sampling_error

#: Probability of a wrong "worse" among all comparisons that are made together.
ALPHA = 0.05
#: Standard errors below this share of the mean are rounding of floats: no spread.
NO_SPREAD = 1e-9
#: Differences of logarithms above this have no share in float64.
LARGEST_LOG = 700.0


@dataclass(frozen=True)
class MeanDifference:
    """The estimated difference a - b of two rows, of values or of their logarithms.

    Args:
        mean: the difference.
        error: its standard error.
        degrees: of freedom of ``error``.
        seeds: independent values behind it, the fewer of both sides.
        pairs: paired seeds; 0 means that the rows were compared as independent ones.
    """

    mean: float
    error: float
    degrees: float
    seeds: int
    pairs: int

    @property
    def p_greater(self) -> float:
        """The p-value of ``alternative="greater"``: small if a is greater than b."""
        if not self._spread:
            return 2.0**-self.seeds if self.mean > 0 else 1.0
        return float(stdtr(self.degrees, -self.mean / self.error))

    @property
    def p_less(self) -> float:
        """The p-value of ``alternative="less"``: small if a is less than b."""
        return replace(self, mean=-self.mean).p_greater

    @property
    def p(self) -> float:
        """The two-sided p-value."""
        return min(1.0, 2 * min(self.p_greater, self.p_less))

    def interval(self, alpha: float) -> tuple[float, float]:
        """Return the interval that leaves out 0 if and only if a one-sided p is at most ``alpha``.

        Its confidence is 1 - 2 alpha.
        """
        if self._spread:
            half = -float(stdtrit(self.degrees, min(alpha, 0.5))) * self.error
            return self.mean - half, self.mean + half
        reach = self.mean if min(self.p_greater, self.p_less) <= alpha else 0.0
        return min(self.mean, reach), max(self.mean, reach)

    @property
    def _spread(self) -> bool:
        return self.error > NO_SPREAD * abs(self.mean)


@dataclass(frozen=True)
class Difference:
    """How two rows a and b differ, for people: interval and p-value agree.

    Args:
        mean: a - b; (a - b) / b if ``relative``.
        low: of the interval at the level at which Holm's procedure tested this difference.
        high: see ``low``.
        p: adjusted by Holm's procedure; at most 5 % if and only if the tested side of the interval
            is beyond 0.
        pairs: paired seeds; 0 means unpaired: independent rows, with the noise of both.
        relative: whether the numbers are shares, from the means of logarithms.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int
    relative: bool

    @property
    def unpaired(self) -> bool:
        """Whether the rows have fewer than two seeds in common."""
        return self.pairs == 0


def in_logs(groups: Sequence[Sequence[Unit]]) -> list[list[Unit]] | None:
    """Return the units of rows in natural logarithms; None if a value has none."""
    if not all(unit.value > 0 for units in groups for unit in units):
        return None
    return [
        [
            replace(
                unit,
                value=math.log(unit.value),
                standard_error=unit.standard_error and unit.standard_error / unit.value,
            )
            for unit in units
        ]
        for units in groups
    ]


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


def compare_units(a: Sequence[Unit], b: Sequence[Unit]) -> MeanDifference | None:
    """Compare two rows' units; None if either side has too few seeds."""
    differences = pair_units(a, b)
    n = len(differences)
    if n > 1:
        mean, error = _mean_and_error(differences)
        return MeanDifference(mean, error, float(n - 1), n, n)
    first, second = cluster_means(a), cluster_means(b)
    n = min(len(first), len(second))
    if n < 2:
        return None
    (mean_a, error_a), (mean_b, error_b) = _mean_and_error(first), _mean_and_error(second)
    error_a, error_b = max(error_a, sampling_error(a)), max(error_b, sampling_error(b))
    error = math.hypot(error_a, error_b)
    parts = error_a**4 / (len(first) - 1) + error_b**4 / (len(second) - 1)
    degrees = error**4 / parts if parts > 0 else float(n - 1)
    return MeanDifference(mean_a - mean_b, error, degrees, n, 0)


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


def holm_levels(p_values: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """Return the level at which Holm's procedure tests each p-value, in the order given.

    A p-value is at most its level if and only if the procedure rejects it. The procedure stops at
    the first that it does not reject; all from there on have the level of that one.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels, stopped = [0.0] * len(p_values), 0.0
    for step, i in enumerate(order):
        level = stopped or alpha / (len(p_values) - step)
        levels[i] = level
        stopped = level if p_values[i] > level else 0.0
    return levels


def differences(
    found: Sequence[tuple[MeanDifference, bool]], p_values: Sequence[float] | None = None
) -> list[Difference]:
    """Return estimates with the p-values and intervals of Holm's procedure over all of them.

    Args:
        found: estimates, and whether they are of logarithms, which become shares.
        p_values: one-sided ones; by default those of both sides.
    """
    sides = 2 if p_values is None else 1
    p_values = [estimate.p for estimate, _ in found] if p_values is None else p_values
    result = []
    for (estimate, logs), level, p in zip(found, holm_levels(p_values), holm(p_values)):
        mean, low, high = (
            math.expm1(min(x, LARGEST_LOG)) if logs else x
            for x in (estimate.mean, *estimate.interval(level / sides))
        )
        result.append(Difference(mean, low, high, p, estimate.pairs, logs))
    return result
