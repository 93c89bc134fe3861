"""Intervals over seeds.

A number is reported as its mean over seeds with an interval, never as the best of several. Seeds
that share a training are not independent, so values are first averaged within each training seed;
only where a single training was sampled several times do the sampling seeds themselves count, and
the interval then says nothing about retraining (``scope`` tells the two apart).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

#: Which seeds an interval speaks of.
Scope = Literal["training seeds", "sampling seeds of one training", "one seed"]

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
    seeds: int
    scope: Scope

    @property
    def half_width(self) -> float | None:
        """Half the interval's width, in the units of the mean; None for one seed."""
        return None if self.high is None else self.high - self.mean


def cluster_means(units: Sequence[Unit]) -> tuple[list[float], Scope]:
    """Return the independent values among ``units`` and the seeds they vary over.

    Several training seeds: one mean per training seed. One training seed: its sampling seeds.
    """
    by_training: dict[int, list[float]] = {}
    for unit in units:
        by_training.setdefault(unit.training_seed, []).append(unit.value)
    if len(by_training) > 1:
        return [math.fsum(v) / len(v) for v in by_training.values()], "training seeds"
    by_sampling: dict[int, list[float]] = {}
    for unit in units:
        by_sampling.setdefault(unit.sampling_seed, []).append(unit.value)
    means = [math.fsum(v) / len(v) for v in by_sampling.values()]
    return means, "sampling seeds of one training" if len(means) > 1 else "one seed"


def interval_over_seeds(units: Sequence[Unit], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of ``units`` over seeds and its two-sided Student t interval.

    ``units`` must not be empty. With n independent values of standard deviation s the interval is
    mean ± t_{n-1} s / sqrt(n); for n = 1 there is none.
    """
    values, scope = cluster_means(units)
    mean = math.fsum(values) / len(values)
    n = len(values)
    if n < 2:
        return Interval(mean, None, None, n, scope)
    quantile = float(stdtrit(n - 1, 0.5 + confidence / 2))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, scope)
