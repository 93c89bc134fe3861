"""Beside a measured row stands what was reported for the same method, and the difference.

The difference is only formed where the metric keys are equal; elsewhere the reported number is
shown and the difference is withheld.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cmbench.leaderboard.rows import REPORTED, Row


@dataclass(frozen=True)
class Reported:
    """What was reported for a measured row's method at its NFE and conditioning."""

    rows: tuple[Row, ...]
    #: Measured minus reported, where the metric keys are equal.
    difference: float | None

    @property
    def text(self) -> str:
        """The reported numbers as printed, each once: ``7.85; 7.80``."""
        found = [row.rank_measurement for row in self.rows]
        return "; ".join(dict.fromkeys(m.text for m in found if m is not None and m.text))


def join_reported(rows: Iterable[Row]) -> dict[str, Reported]:
    """Return the reported counterpart of every measured row that has one, by row id.

    A published row whose conditioning is not stated is a counterpart of both.
    """
    rows = list(rows)
    published: Mapping[tuple[str, int | None], list[Row]] = defaultdict(list)
    for row in rows:
        if row.kind == REPORTED:
            published[row.method, row.nfe].append(row)
    result = {}
    for row in rows:
        if row.kind != REPORTED:
            found = [
                p for p in published.get((row.method, row.nfe), ())
                if p.conditional in (None, row.conditional)
            ]  # fmt: skip
            if found:
                result[row.id] = Reported(tuple(found), _difference(row, found))
    return result


def _difference(row: Row, published: Sequence[Row]) -> float | None:
    own = row.rank_measurement
    if own is None or not own.key:
        return None
    values = {
        other.mean
        for p in published
        if (other := p.measurements.get(own.name)) is not None and other.key == own.key
    }
    # Sources that disagree leave no single number to compare with.
    return own.mean - values.pop() if len(values) == 1 else None
