"""Intervals over seeds.

A number is reported as its mean over seeds with an interval, never as the best of several. Seeds
that share a training are not independent, so values are first averaged within each training seed;
only if a single training was sampled several times do the sampling seeds themselves count, and the
interval then says nothing about retraining.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Unit:
    """One measured value with the seeds it came from."""

    training_seed: int
    sampling_seed: int
    value: float


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with its Student t interval; ``low`` and ``high`` are None for one seed."""

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


def interval_over_seeds(units: Sequence[Unit]) -> Interval:
    """Return the mean of ``units`` over seeds and its two-sided 95 % Student t interval.

    ``units`` must not be empty. With n independent values of standard deviation s the interval is
    mean ± t_{n-1} s / sqrt(n); for n = 1 there is none.
    """
    values = cluster_means(units)
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    quantile = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
