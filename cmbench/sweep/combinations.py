"""Sweeps over options: each value of an option makes runs of its own. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from cmbench.errors import UserError
from cmbench.records.options import AnyOf, dotted
from cmbench.sweep.recipes import Table, nested

#: More runs of one method in a sweep are a typing error.
MAX_RUNS = 1000


def combinations(overrides: Mapping[str, Any], takes_list: Callable[[str], bool]) -> list[Table]:
    """Return one table of overrides per combination of values, the last option changing first.

    An option has several values if it is an :class:`AnyOf`, or a list where the option itself takes
    none, which ``takes_list(key)`` says of a dotted key.

    Raises:
        UserError: an option has an empty list of values, or there are too many combinations.
    """
    axes = [(key, _values(key, value, takes_list)) for key, value in dotted(overrides)]
    require_few(axes, 1)
    keys = [key for key, _ in axes]
    chosen = product(*(values for _, values in axes))
    return [nested(dict(zip(keys, values, strict=True))) for values in chosen]


def require_few(axes: Sequence[tuple[str, Sequence[Any]]], seeds: int) -> None:
    """Raise ``UserError`` if the values of options and the seeds make too many runs."""
    runs = math.prod(len(values) for _, values in axes) * seeds
    swept = [f"{key} ({len(values)})" for key, values in axes if len(values) > 1]
    if swept and runs > MAX_RUNS:
        raise UserError(
            "-o",
            f"the values of {', '.join(swept)}, times {seeds} seed(s), make "
            f"{runs:,} runs per method",
            allowed=f"at most {MAX_RUNS:,}",
            remedy="give fewer values, or sweep over fewer options at once",
        )


def stated_axes(overrides: Mapping[str, Any]) -> list[tuple[str, Sequence[Any]]]:
    """Return the options that are given several values for certain, whatever they take."""
    return [(key, v.values) for key, v in dotted(overrides) if isinstance(v, AnyOf)]


def _values(key: str, value: Any, takes_list: Callable[[str], bool]) -> Sequence[Any]:
    if isinstance(value, AnyOf):
        return value.values
    if not isinstance(value, list | tuple) or takes_list(key):
        return (value,)
    if not value:
        raise UserError(
            f"option {key}", "an empty list of values", remedy="give a value, or leave it out"
        )
    return value
