"""What a metric's record says besides its value: floor, interval, extrapolation.

Records are read here and nowhere else, since older ones have other fields: the floor was the score
of one split of the real images into halves (``real_halves``, for the rank metric also ``floor``),
and the interval beside a Fréchet distance was that of its extrapolation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cmbench.metrics.values import holds, normal_interval
from cmbench.records.fields import LARGEST
from cmbench.records.record import MetricRecord


@dataclass(frozen=True)
class Floor:
    """What a perfect generator is expected to score; a ceiling where higher is better.

    Args:
        value: the score.
        std: its standard deviation, where known.
        samples: number of samples that it is for; 0 if the record does not say.
        reference_samples: number of real images that it is for; 0 if the record does not say.
        splits: random splits of the real images behind it. 1 is an older record's single split: the
            score of two halves of ``samples`` images each, at other counts than the row's.
        higher_is_better: direction of the metric.
    """

    value: float
    std: float | None
    samples: int
    reference_samples: int
    splits: int
    higher_is_better: bool

    @property
    def name(self) -> str:
        """``floor``, or ``ceiling`` where higher is better."""
        return "ceiling" if self.higher_is_better else "floor"

    @property
    def number(self) -> str:
        """The score with its standard deviation, for people."""
        return f"{self.value:.4g}" + ("" if self.std is None else f" ± {self.std:.2g}")

    @property
    def short(self) -> str:
        """Two or three words on what it is."""
        return "two halves of the real images" if self.splits == 1 else "perfect generator"

    @property
    def meaning(self) -> str:
        """What was compared with what, for people."""
        if self.splits == 1:
            each = f" of {self.samples:,} each" if self.samples else ""
            return f"one split of the real images into halves{each}"
        return (
            f"a perfect generator with {self.samples:,} samples against"
            f" {self.reference_samples:,} real images"
        )


@dataclass(frozen=True)
class Extrapolation:
    """A Fréchet distance extrapolated to infinitely many samples, with its own 95 % interval."""

    value: float
    low: float
    high: float
    reliable: bool


def floor_of(metric: MetricRecord) -> Floor | None:
    """Return the floor of a metric; None where the record has none, or nothing that is one."""
    detail = metric.detail
    found = detail.get("floor", detail.get("real_halves"))
    if not isinstance(found, Mapping):
        half = detail.get("real_half_samples", detail.get("floor_count", 0))
        found = {"value": found, "samples": half, "reference_samples": half, "splits": 1}
    value, std = _number(found.get("value")), _number(found.get("std"))
    if value is None:
        return None
    names = ("samples", "reference_samples", "splits")
    samples, reference, splits = (_count(found.get(name)) for name in names)
    return Floor(value, std, samples, reference, splits, metric.higher_is_better)


def extrapolation_of(metric: MetricRecord) -> Extrapolation | None:
    """Return a distance extrapolated to infinitely many samples; None where there is none."""
    found = metric.detail.get("infinity")
    if not isinstance(found, Mapping):
        return None
    interval = found.get("interval")
    bounds = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None, None)
    value, low, high = (_number(x) for x in (found.get("value"), *bounds))
    if value is None or low is None or high is None:
        return None
    return Extrapolation(value, low, high, found.get("reliable") is not False)


def interval_of(metric: MetricRecord) -> tuple[float, float] | None:
    """Return the 95 % interval of the value itself, within one cell; None where not known."""
    extrapolation = extrapolation_of(metric)
    if extrapolation is None or metric.interval != (extrapolation.low, extrapolation.high):
        return metric.interval
    if metric.value is None or metric.standard_error is None:
        return None
    low, high = normal_interval(metric.value, metric.standard_error)
    return max(0.0, low), high


def contradiction_of(metric: MetricRecord) -> str:
    """Return why a value cannot be the one that was stored with the rest; "" where nothing tells.

    An interval holds its value, and ``infinity`` is 2 value - the mean of ``half_distances``
    (:func:`cmbench.metrics.frechet.half_split_infinity`).
    """
    value, infinity = metric.value, extrapolation_of(metric)
    if value is None:
        return ""
    of_infinity = infinity is not None and metric.interval == (infinity.low, infinity.high)
    if metric.interval is not None and not of_infinity and not holds(metric.interval, value):
        low, high = metric.interval
        return f"its value {value:.6g} is outside its 95 % interval, {low:.6g} to {high:.6g}"
    if infinity is None:
        return ""
    if not holds((infinity.low, infinity.high), infinity.value):
        return f"its extrapolation {infinity.value:.6g} is outside the interval of that"
    halves = metric.detail["infinity"].get("half_distances")
    known = [_number(x) for x in halves] if isinstance(halves, list | tuple) else []
    half, other = known if len(known) == 2 else (None, None)
    if half is None or other is None:
        return ""
    expected = (infinity.value + (half + other) / 2) / 2
    if not math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9):
        return f"its value is {value:.6g}, but its extrapolation is one of {expected:.6g}"
    return ""


def _count(value: Any) -> int:
    """Return a count of a record's free-form part, or 0 for anything else."""
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def _number(value: Any) -> float | None:
    """Return a finite number of a record's free-form part, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return None
    return float(value)
