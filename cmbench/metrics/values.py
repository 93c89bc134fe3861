"""What a metric returns: the number, its uncertainty, and everything that decides it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Half-width of a normal 95 % interval in standard errors.
Z95 = 1.959963984540054

Json = Any
#: What an extractor may do more quickly and not quite the same; part of a key's preprocessing.
APPROXIMATIONS = ("bfloat16", "channels-last", "compiled")
#: First parts of the keys of Fréchet distances, of pooled and of spatial features.
FRECHET_FAMILIES = ("fd", "sfd")


@dataclass(frozen=True)
class Estimate:
    """What the function of a metric returns if it knows more than the number.

    Args:
        value: the number; may be infinite only where the metric itself is, never NaN.
        standard_error: sampling error of ``value`` from this one set of samples, where known.
        interval: 95 % interval (low, high) of ``value``, which it holds, where known.
        detail: further numbers and facts, JSON-ready.
        facts: words that tell formulas of one name apart; part of the metric key.
    """

    value: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    detail: Mapping[str, Json] = field(default_factory=dict)
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class MetricValue(Estimate):
    """One number of a cell: an :class:`Estimate` with its name, direction and key.

    Two values may be ranked together only if their keys agree: ``key`` holds everything that
    decides the number except the samples.
    """

    name: str = ""
    higher_is_better: bool = False
    key: str = ""


def normal_interval(value: float, standard_error: float) -> tuple[float, float]:
    """Return the 95 % interval ``value`` -+ 1.96 standard errors."""
    return value - Z95 * standard_error, value + Z95 * standard_error


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of ``count`` trials; stays in [0, 1]."""
    z2 = Z95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def holds(interval: tuple[float, float], value: float) -> bool:
    """Whether ``value`` lies in an interval, up to rounding."""
    slack = 1e-9 * max(map(abs, (*interval, value)))
    return interval[0] - slack <= value <= interval[1] + slack


def is_approximate(key: str) -> bool:
    """Whether a metric key is that of an extractor with :data:`APPROXIMATIONS`."""
    preprocessing = key.split(":")[2] if key.count(":") > 1 else ""
    return any(part in APPROXIMATIONS for part in preprocessing.split("+")[1:])


def is_frechet(key: str) -> bool:
    """Whether a metric key is that of a Fréchet distance: positive, and compared by ratio."""
    return key.partition(":")[0] in FRECHET_FAMILIES
