"""Compare two methods: paired differences, intervals and a verdict for every setting they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cmbench.errors import UserError
from cmbench.leaderboard.ranking import ALPHA
from cmbench.leaderboard.rows import REPORTED, Row
from cmbench.leaderboard.significance import Difference, compare_units, holm
from cmbench.metrics.values import is_approximate

Verdict = Literal["A is better", "B is better", "no difference shown", "not comparable"]


@dataclass(frozen=True)
class RowComparison:
    """A against B at one dataset, NFE and conditioning."""

    a: Row
    b: Row
    metric: str
    difference: Difference | None
    #: Holm's adjusted p-value over all comparisons of the call.
    p_adjusted: float | None
    verdict: Verdict
    reason: str = ""


def select(rows: Iterable[Row], selector: str) -> list[Row]:
    """Return the measured rows that ``METHOD[:RECIPE[:SAMPLER]]`` or a row id selects.

    Raises:
        UserError: if there is none; lists what there is.
    """
    measured = [row for row in rows if row.kind != REPORTED]
    parts = selector.split(":")
    found = [row for row in measured if len(selector) >= 6 and row.id.startswith(selector)]
    found = found or [
        row
        for row in measured
        if [row.method, row.recipe.rpartition(":")[2], row.sampler][: len(parts)] == parts
    ]
    if not found:
        known = sorted({f"{row.method}:{row.recipe.rpartition(':')[2]}" for row in measured})
        raise UserError(
            "compare",
            f"no measured rows match {selector!r}",
            allowed=", ".join(known) or "none",
            remedy="give METHOD, METHOD:RECIPE, METHOD:RECIPE:SAMPLER or a row id",
        )
    return found


def compare(a: Sequence[Row], b: Sequence[Row]) -> list[RowComparison]:
    """Compare every row of ``a`` with the row of ``b`` of equal dataset, NFE and conditioning.

    Raises:
        UserError: if either side has two rows for one setting, or none is shared.
    """
    first, second = _by_setting("A", a), _by_setting("B", b)
    shared = [(first[k], second[k]) for k in first if k in second]
    if not shared:
        raise UserError(
            "compare",
            "A and B share no dataset, NFE and conditioning",
            allowed=f"A has {_settings(first)}; B has {_settings(second)}",
            remedy="measure both at a common NFE",
        )
    differences = [_difference(x, y) for x, y in shared]
    adjusted = iter(holm([d.p for d, _ in differences if d is not None]))
    return [
        _comparison(x, y, found, reason, next(adjusted) if found is not None else None)
        for (x, y), (found, reason) in zip(shared, differences)
    ]


def _by_setting(side: str, rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row.dataset, row.nfe, row.conditional)
        if key in found:
            raise UserError(
                "compare",
                f"{side} selects two rows at NFE {row.nfe_text}: "
                f"{_name(found[key])} and {_name(row)}",
                remedy="add the recipe or the sampler, or give the row id",
            )
        found[key] = row
    return found


def _name(row: Row) -> str:
    return f"{row.method}:{row.recipe}:{row.sampler} ({row.id})"


def _settings(rows: Iterable[tuple[object, ...]]) -> str:
    return ", ".join(f"{dataset} NFE {nfe or 'not stated'}" for dataset, nfe, _ in rows)


def _difference(a: Row, b: Row) -> tuple[Difference | None, str]:
    x, y = a.rank_measurement, b.rank_measurement
    if x is None or y is None:
        return None, "the rank metric was not computed"
    if x.key != y.key:
        return None, f"metric keys differ: {x.key} and {y.key}"
    if is_approximate(x.key):
        return None, "measured under an approximate extractor"
    if a.nfe is None:
        return None, "NFE not stated: equal cost cannot be assumed"
    if not (a.full_samples and b.full_samples):
        return None, "fewer samples than the protocol asks for"
    found = compare_units(x.units, y.units)
    return found, "" if found is not None else "one seed: an interval needs at least two"


def _comparison(
    a: Row, b: Row, found: Difference | None, reason: str, p_adjusted: float | None
) -> RowComparison:
    measurement = a.rank_measurement
    if found is None or p_adjusted is None or measurement is None:
        return RowComparison(a, b, a.rank_metric, None, None, "not comparable", reason)
    verdict: Verdict = "no difference shown"
    if p_adjusted <= ALPHA:
        a_wins = (found.mean > 0) == measurement.higher_is_better
        verdict = "A is better" if a_wins else "B is better"
    return RowComparison(a, b, measurement.name, found, p_adjusted, verdict)
