"""Is one row better than another? Paired bootstrap over seeds, with Holm's correction.

Cells with one sampling seed start from the same noise, so two rows are compared seed by seed and
what the noise does to both cancels. With a handful of seeds the plain percentile bootstrap is far
too sure of itself (three seeds of one sign would be a certainty). Two things mend that:

* the bootstrap is smoothed and its percentiles are expanded (T. Hesterberg 2015, "What Teachers
  Should Know About the Bootstrap", arXiv:1411.5279, section 4.3): resampled means get Gaussian
  noise of standard deviation s/n, so that their variance is the unbiased s²/n, and normal quantiles
  are replaced by Student's. The mixture's distribution function is evaluated exactly;
* a p-value is never smaller than that of the paired t test, nor an interval narrower: the bootstrap
  knows nothing of tails beyond its n values.

Differences without any spread leave neither a t statistic nor a bootstrap, and that two or three
seeds agree to the last digit is no certainty either: the exact sign test over seeds remains, whose
p-value is 2^(1-n).

Up to six values every resample is enumerated; beyond, a fixed seeded set of them is drawn, so a
result never changes between calls.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, ndtri_exp, stdtr, stdtrit

from cmbench.leaderboard.statistics import CONFIDENCE, Unit, cluster_means
from cmbench.seeds import derive_seed

Array = npt.NDArray[np.float64]

#: Standard deviations below this share of the mean are rounding of floats: no spread.
NO_SPREAD = 1e-9
ENUMERATED = 6
RESAMPLES = 2000


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


@cache
def resample_weights(n: int) -> tuple[Array, Array]:
    """Return ``(shares [R, n], probability [R])`` of the resamples of n values."""
    if n > ENUMERATED:
        generator = np.random.default_rng(derive_seed("bootstrap", n))
        drawn = generator.integers(0, n, (RESAMPLES, n))
        shares = np.stack([np.bincount(row, minlength=n) for row in drawn]) / n
        return shares, np.full(RESAMPLES, 1 / RESAMPLES)
    counts = [np.bincount(c, minlength=n) for c in combinations_with_replacement(range(n), n)]
    ways = [math.factorial(n) / math.prod(math.factorial(int(k)) for k in c) for c in counts]
    return np.stack(counts) / n, np.array(ways) / n**n


def pair_units(a: Sequence[Unit], b: Sequence[Unit]) -> list[float]:
    """Return the differences a - b of paired seeds, one per independent seed; maybe empty.

    Cells pair by (training seed, sampling seed); where fewer than two pair so (an imported
    checkpoint has no training seed of ours), by sampling seed, means over trainings.
    """
    first = {(u.training_seed, u.sampling_seed): u.value for u in a}
    second = {(u.training_seed, u.sampling_seed): u.value for u in b}
    shared = [Unit(t, s, first[t, s] - second[t, s]) for t, s in first if (t, s) in second]
    if shared:
        differences, _ = cluster_means(shared)
        if len(differences) > 1:
            return differences
    means_a, means_b = _by_sampling_seed(a), _by_sampling_seed(b)
    return [means_a[s] - means_b[s] for s in means_a if s in means_b]


def _by_sampling_seed(units: Sequence[Unit]) -> dict[int, float]:
    values: dict[int, list[float]] = defaultdict(list)
    for unit in units:
        values[unit.sampling_seed].append(unit.value)
    return {seed: math.fsum(found) / len(found) for seed, found in values.items()}


def compare_units(
    a: Sequence[Unit], b: Sequence[Unit], confidence: float = CONFIDENCE
) -> Difference | None:
    """Compare two rows' units; None if either side has too few seeds to say anything."""
    differences = pair_units(a, b)
    if len(differences) > 1:
        return paired_difference(differences, confidence)
    values_a, values_b = cluster_means(a)[0], cluster_means(b)[0]
    if len(values_a) < 2 or len(values_b) < 2:
        return None
    return independent_difference(values_a, values_b, confidence)


def paired_difference(values: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Bootstrap the mean of at least two paired differences."""
    data = np.asarray(values, float)
    n, mean = len(data), float(np.mean(data))
    deviation = float(np.std(data, ddof=1))
    if deviation <= NO_SPREAD * abs(mean):
        return _constant_difference(mean, n, n, confidence)
    shares, weights = resample_weights(n)
    return _difference(
        mean,
        shares @ data,
        np.log(weights),
        deviation / n,
        deviation / math.sqrt(n),
        n - 1,
        n,
        confidence,
    )


def independent_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE
) -> Difference:
    """Bootstrap the difference of the means of two independent groups (Welch's degrees)."""
    first, second = np.asarray(a, float), np.asarray(b, float)
    variances = [float(np.var(x, ddof=1)) / len(x) for x in (first, second)]
    total = sum(variances)
    mean = float(np.mean(first) - np.mean(second))
    if math.sqrt(total) <= NO_SPREAD * abs(mean):
        return _constant_difference(mean, min(len(first), len(second)), 0, confidence)
    parts = sum(v**2 / (len(x) - 1) for v, x in zip(variances, (first, second)))
    degrees = total**2 / parts if parts > 0 else len(first) + len(second) - 2
    (shares_a, weights_a), (shares_b, weights_b) = map(resample_weights, (len(a), len(b)))
    means = np.subtract.outer(shares_a @ first, shares_b @ second).ravel()
    logs = np.add.outer(np.log(weights_a), np.log(weights_b)).ravel()
    smoothing = math.sqrt(sum(v / len(x) for v, x in zip(variances, (first, second))))
    return _difference(mean, means, logs, smoothing, math.sqrt(total), degrees, 0, confidence)


def sign_test_p(n: int) -> float:
    """Return the two-sided p-value of n differences of one sign: 2^(1-n)."""
    return 2.0 ** (1 - n)


def _constant_difference(mean: float, n: int, pairs: int, confidence: float) -> Difference:
    """Return what ``n`` equal differences say; the interval reaches 0 where p is not small."""
    p = sign_test_p(n) if mean != 0 else 1.0
    reach = 0.0 if p > 1 - confidence else mean
    return Difference(mean, min(mean, reach), max(mean, reach), p, pairs)


def _difference(
    mean: float,
    means: Array,
    log_weights: Array,
    smoothing: float,
    standard_error: float,
    degrees: float,
    pairs: int,
    confidence: float,
) -> Difference:
    tail = float(stdtrit(degrees, 0.5 + confidence / 2))
    tails = [float(_log_share(sign * means / smoothing, log_weights)) for sign in (1.0, -1.0)]
    p = 2 * float(stdtr(degrees, float(ndtri_exp(min(tails)))))
    p_t = 2 * float(stdtr(degrees, -abs(mean) / standard_error))
    low = _quantile(means, log_weights, smoothing, -tail)
    high = -_quantile(-means, log_weights, smoothing, -tail)
    half = tail * standard_error
    return Difference(mean, min(low, mean - half), max(high, mean + half), max(p, p_t), pairs)


def _quantile(means: Array, log_weights: Array, smoothing: float, z: float) -> float:
    """Return x where the mixture's distribution function equals Phi(z), by bisection."""
    target = float(log_ndtr(z))
    # Ten more standard deviations than z hold every tail of the mixture.
    low = float(means.min()) + (z - 10) * smoothing
    high = float(means.max()) + (z + 10) * smoothing
    for _ in range(60):
        middle = (low + high) / 2
        found = float(_log_share((middle - means) / smoothing, log_weights))
        low, high = (middle, high) if found < target else (low, middle)
    return (low + high) / 2


def _log_share(z: Array, log_weights: Array) -> Array:
    """Return log of the weighted mean of Phi(z) over the last axis (resamples)."""
    logs = log_ndtr(z) + log_weights
    largest = logs.max(-1)
    shares: Array = largest + np.log(np.exp(logs - largest[..., None]).sum(-1))
    return shares


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


def pairwise_p(
    groups: Sequence[Sequence[Unit]], alpha: float | None = None
) -> dict[tuple[int, int], float]:
    """Return the p-value of every pair i < j that can be compared.

    A group of k rows has k (k - 1) / 2 pairs; those of rows with the same seeds (nearly all, in a
    sweep) are evaluated together.

    Args:
        groups: the units of each row.
        alpha: if given, pairs that Holm's procedure cannot reject at this level may get p = 1
            without a bootstrap. What it rejects stays the same: a p-value is never below the
            paired t test's, so a pair that is not rejected by its t test is not rejected at all,
            and neither is any pair behind it in the order.
    """
    result: dict[tuple[int, int], float] = {}
    alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for index, units in enumerate(groups):
        alike[tuple(sorted((u.training_seed, u.sampling_seed) for u in units))].append(index)
    family = {}
    paired: list[tuple[list[tuple[int, int]], Array]] = []
    for number, members in enumerate(alike.values()):
        family.update(dict.fromkeys(members, number))
        paired.append(_alike_pairs(members, groups))
    for i in range(len(groups)):
        for j in range(i + 1, len(groups)):
            if family[i] != family[j]:
                p = _unlike_p(groups[i], groups[j])
                if p is not None:
                    result[i, j] = p
    paired = [(pairs, data) for pairs, data in paired if pairs]
    for pairs, data in paired:
        result.update(zip(pairs, paired_t_p(data).tolist()))
    adjusted = dict(zip(result, holm(list(result.values()))))
    for pairs, data in paired:
        keep = [alpha is None or adjusted[pair] <= alpha for pair in pairs]
        result.update(dict.fromkeys(pairs, 1.0))
        chosen = [pair for pair, kept in zip(pairs, keep) if kept]
        if chosen:
            result.update(zip(chosen, paired_p(data[np.array(keep)]).tolist()))
    return dict(sorted(result.items()))


def _unlike_p(a: Sequence[Unit], b: Sequence[Unit]) -> float | None:
    """Return the p-value of `compare_units` without its interval, which takes most of the time."""
    differences = pair_units(a, b)
    if len(differences) > 1:
        return float(paired_p(np.array([differences]))[0])
    found = compare_units(a, b)
    return None if found is None else found.p


def _alike_pairs(
    members: Sequence[int], groups: Sequence[Sequence[Unit]]
) -> tuple[list[tuple[int, int]], Array]:
    """Return the pairs among rows that all have the same seeds, and their differences [pairs, n].

    Means within clusters are linear, so differences of cluster means are cluster means of
    differences, and rows are paired by subtraction.
    """
    means = []
    for index in members:
        ordered = sorted(groups[index], key=lambda u: (u.training_seed, u.sampling_seed))
        means.append(cluster_means(ordered)[0])
    values = np.array(means)
    if len(members) < 2 or values.shape[1] < 2:
        return [], values[:0]
    first, second = np.triu_indices(len(members), 1)
    pairs = [(members[a], members[b]) for a, b in zip(first.tolist(), second.tolist())]
    return pairs, values[first] - values[second]


def paired_t_p(data: Array) -> Array:
    """Return the two-sided p-value of the paired t test of each row of ``data`` ``[pairs, n]``.

    Rows without any spread have that of the sign test.
    """
    n = data.shape[1]
    mean, deviation = data.mean(1), data.std(1, ddof=1)
    flat = deviation <= NO_SPREAD * np.abs(mean)
    safe = np.where(flat, 1.0, deviation)
    p: Array = 2 * stdtr(n - 1, -np.abs(mean) / (safe / math.sqrt(n)))
    return np.where(flat, np.where(mean == 0, 1.0, sign_test_p(n)), p)


def paired_p(data: Array, block: int = 4096) -> Array:
    """Return the p-value of each row of ``data`` ``[pairs, n]``: `paired_difference` in bulk."""
    shares, weights = resample_weights(data.shape[1])
    block = max(1, block * 10 // len(weights))
    blocks = [data[start : start + block] for start in range(0, len(data), block)]
    return np.concatenate([_block_p(part, shares, np.log(weights)) for part in blocks])


def _block_p(data: Array, shares: Array, log_weights: Array) -> Array:
    n = data.shape[1]
    deviation = data.std(1, ddof=1)
    flat = deviation <= NO_SPREAD * np.abs(data.mean(1))
    safe: Any = np.where(flat, 1.0, deviation)
    scaled = (data @ shares.T) / (safe / n)[:, None]
    tails = [_log_share(sign * scaled, log_weights) for sign in (1.0, -1.0)]
    p = 2 * stdtr(n - 1, ndtri_exp(np.minimum(*tails)))
    p_t = paired_t_p(data)
    return np.where(flat, p_t, np.maximum(p, p_t))
