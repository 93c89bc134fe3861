"""How numbers are printed: enough digits to distinguish rows, no more than were measured."""

from __future__ import annotations

import math

from cmbench.leaderboard.significance import Difference
from cmbench.leaderboard.statistics import Interval

#: A spread below this share of the mean is the rounding of float64, not a spread.
ROUNDING = 1e-12


def format_number(value: float, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits, plain where it is readable."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    return f"{value:.{digits - 1}e}"


def format_mean(interval: Interval) -> str:
    """Return ``mean ± half-width``, rounded to the second digit of the half-width."""
    half = interval.half_width
    if half is None or half <= ROUNDING * abs(interval.mean):
        return format_number(interval.mean, 4)
    decimals = max(0, 1 - math.floor(math.log10(half)))
    most = 9 if abs(interval.mean) >= 0.01 else 6
    if decimals > most or abs(interval.mean) >= 1e7:
        return f"{interval.mean:.3e} ± {half:.1e}"
    return f"{interval.mean:,.{decimals}f} ± {half:,.{decimals}f}"


def format_difference(difference: Difference, *, interval: bool = False) -> str:
    """Return ``+5 %``, or ``+0.0123`` where differences are not shares; maybe with its interval."""
    numbers = [difference.mean, *([difference.low, difference.high] if interval else ())]
    if difference.relative:
        mean, *bounds = (f"{100 * x:+,.0f}" for x in numbers)
        return f"{mean} %" + (f" [{', '.join(bounds)}]" if bounds else "")
    mean, *bounds = (f"{'+' if x > 0 else ''}{format_number(x)}" for x in numbers)
    return mean + (f" [{', '.join(bounds)}]" if bounds else "")


def format_count(value: float) -> str:
    """Return a count with a metric suffix: ``55.7M``, ``1.5B``, ``898``."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.4g}"
