"""Compare two methods: paired differences, intervals and a verdict for every setting they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cmbench.errors import UserError
from cmbench.leaderboard.best_groups import compared_units
from cmbench.leaderboard.rows import Row, conditioning
from cmbench.leaderboard.selection import Setting, selectors, setting_of
from cmbench.leaderboard.significance import (
    ALPHA,
    Difference,
    MeanDifference,
    compare_units,
    differences,
)
from cmbench.metrics.values import is_approximate

Verdict = Literal["A is better", "B is better", "no difference shown", "not comparable"]


@dataclass(frozen=True)
class RowComparison:
    """A against B at one dataset, NFE and conditioning."""

    a: Row
    b: Row
    metric: str
    #: A - B with interval and p-value, both by Holm's procedure over all settings of the call.
    difference: Difference | None
    verdict: Verdict
    reason: str = ""


def compare(a: Sequence[Row], b: Sequence[Row], among: Sequence[Row] = ()) -> list[RowComparison]:
    """Compare every row of ``a`` with the row of ``b`` of equal dataset, NFE and conditioning.

    Settings that only one side has are left out.

    Args:
        a: rows of one side.
        b: rows of the other side.
        among: all rows that the sides were selected from, for the names that select one of them.

    Raises:
        UserError: if either side has two rows for a shared setting, or none is shared.
    """
    first, second = _by_setting(a), _by_setting(b)
    if not first.keys() & second.keys():
        raise UserError(
            "compare",
            "A and B share no dataset, NFE and conditioning",
            allowed=f"A has {_settings(first)}; B has {_settings(second)}",
            remedy="measure both at a common NFE and conditioning",
        )
    shared = [
        (_only("A", first[k], among), _only("B", second[k], among)) for k in first if k in second
    ]
    estimated = [_estimate(x, y) for x, y in shared]
    known = [(e, relative) for e, relative, _ in estimated if e is not None]
    found = iter(differences(known))
    return [
        _comparison(x, y, next(found) if estimate is not None else None, reason)
        for (x, y), (estimate, _, reason) in zip(shared, estimated)
    ]


def _by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(setting_of(row), []).append(row)
    return found


def _only(side: str, members: Sequence[Row], among: Sequence[Row]) -> Row:
    """Return the one row that a side has at a setting."""
    if len(members) == 1:
        return members[0]
    setting = setting_of(members[0])
    others = [row for row in among if setting_of(row) == setting and row not in members]
    raise UserError(
        "compare",
        f"{side} selects {len(members)} rows at {_setting(setting)}",
        allowed=" or ".join(selectors([*members, *others])[: len(members)]),
        remedy="give one of them, in quotes",
    )


def _settings(rows: Iterable[Setting]) -> str:
    return ", ".join(map(_setting, rows))


def _setting(setting: Setting) -> str:
    dataset, nfe, conditional = setting
    return f"{dataset} NFE {nfe or 'not stated'} {conditioning(conditional)}".rstrip()


def _estimate(a: Row, b: Row) -> tuple[MeanDifference | None, bool, str]:
    """Return A - B, whether of logarithms, and why there is none."""
    x, y = a.rank_measurement, b.rank_measurement
    reason = ""
    if x is None or y is None:
        return None, False, "the rank metric was not computed"
    if x.key != y.key:
        reason = f"metric keys differ: {x.key} and {y.key}"
    elif is_approximate(x.key):
        reason = "measured under an approximate extractor"
    elif a.nfe is None:
        reason = "NFE not stated: equal cost cannot be assumed"
    elif not (a.full_samples and b.full_samples):
        reason = "fewer samples than the protocol asks for"
    if reason:
        return None, False, reason
    units, relative = compared_units([x.units, y.units], x.key)
    found = compare_units(*units)
    return found, relative, "" if found else "one seed: an interval needs at least two"


def _comparison(a: Row, b: Row, found: Difference | None, reason: str) -> RowComparison:
    measurement = a.rank_measurement
    if found is None or measurement is None:
        return RowComparison(a, b, a.rank_metric, None, "not comparable", reason)
    verdict: Verdict = "no difference shown"
    if found.p <= ALPHA:
        a_wins = (found.mean > 0) == measurement.higher_is_better
        verdict = "A is better" if a_wins else "B is better"
    return RowComparison(a, b, measurement.name, found, verdict, reason)
