"""Intervals over seeds.

A number is reported as its mean over seeds with an interval, never as the best of several. Seeds
that share a training are not independent, so values are first averaged within each training seed;
only if a single training was sampled several times do the sampling seeds themselves count, and the
interval then says nothing about retraining.

Rows that are sampled from the same noise share its luck: three noise seeds that happen to agree
make every row's values agree. The error of a mean is therefore never less than the sampling error
that the cells state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from cmbench.metrics.values import Z95

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Unit:
    """One measured value with the seeds it came from, and its sampling error where known.

    Raises:
        ValueError: ``value`` is not a finite number.
    """

    training_seed: int
    sampling_seed: int
    value: float
    standard_error: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no mean."""
        if not math.isfinite(self.value):
            raise ValueError(
                f"Unit: the value of training seed {self.training_seed}, sampling seed"
                f" {self.sampling_seed} is {self.value}; allowed: finite numbers; leave it out"
            )


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with its 95 % interval; ``low`` and ``high`` are None for one seed."""

    mean: float
    low: float | None
    high: float | None
    #: independent values behind the mean
    seeds: int

    @property
    def half_width(self) -> float | None:
        """Half the interval's width, in the units of the mean; None for one seed."""
        return None if self.high is None else self.high - self.mean


def cluster_means(units: Sequence[Unit]) -> list[float]:
    """Return the independent values among ``units``.

    Several training seeds: one mean per training seed. One training seed: its sampling seeds.
    """
    several = len({unit.training_seed for unit in units}) > 1
    clusters: dict[int, list[float]] = {}
    for unit in units:
        seed = unit.training_seed if several else unit.sampling_seed
        clusters.setdefault(seed, []).append(unit.value)
    return [math.fsum(values) / len(values) for values in clusters.values()]


def sampling_error(units: Sequence[Unit]) -> float:
    """Return the error of a row's mean that sampling noise causes; 0 where no cell states its own.

    That is sqrt(mean SE² / n) of n sampling seeds: trainings that are sampled from the same noise
    do not average it.
    """
    squares = [u.standard_error**2 for u in units if u.standard_error is not None]
    seeds = len({unit.sampling_seed for unit in units})
    return math.sqrt(math.fsum(squares) / len(squares) / seeds) if squares else 0.0


def interval_over_seeds(units: Sequence[Unit]) -> Interval:
    """Return the mean of ``units`` over seeds and its two-sided 95 % interval.

    ``units`` must not be empty. With n independent values of standard deviation s the interval is
    mean ± max(t_{n-1} s / sqrt(n), 1.96 :func:`sampling_error`); for n = 1 there is none.
    """
    values = cluster_means(units)
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    quantile = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    half = max(half, Z95 * sampling_error(units))
    return Interval(mean, mean - half, mean + half, n)
