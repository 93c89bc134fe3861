"""Joins a measured row with what was reported for the same method, and the difference.

The difference is computed only if the metric keys are equal. Otherwise the reported number and both
keys are shown, without a difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cmbench.leaderboard.rows import REPORTED, Row


@dataclass(frozen=True)
class Reported:
    """What was reported for a measured row's method at its NFE and conditioning."""

    #: The published rows, in the order of their board.
    rows: tuple[Row, ...]
    #: Metric and key of the measured row; the key may be empty.
    metric: str
    key: str
    #: Measured minus reported, if the metric keys are equal.
    difference: float | None
    #: Why there is no difference, short enough for a table cell; empty if there is one.
    withheld: str = ""

    @property
    def text(self) -> str:
        """The reported numbers as printed, each once: ``7.85; 7.80``."""
        found = [row.rank_measurement for row in self.rows]
        return "; ".join(dict.fromkeys(m.text for m in found if m is not None and m.text))

    @property
    def under(self) -> str:
        """The protocols of the reported numbers with their keys, each once."""
        return "; ".join(dict.fromkeys(protocol_text(row) for row in self.rows))


def protocol_text(row: Row) -> str:
    """Return what a published row was measured under, and its metric key if the board has one."""
    found = row.rank_measurement
    key = found.key if found is not None else ""
    return f"{row.protocol[0] or 'no protocol named'} ({f'key {key}' if key else 'no metric key'})"


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
                p
                for p in published.get((row.method, row.nfe), ())
                if p.conditional in (None, row.conditional)
            ]
            if found:
                result[row.id] = _joined(row, found)
    return result


def _joined(row: Row, published: Sequence[Row]) -> Reported:
    own = row.rank_measurement
    key = own.key if own is not None else ""
    values = {
        other.mean
        for p in published
        if own is not None and (other := p.measurements.get(own.name)) and key and other.key == key
    }
    if own is None:
        difference, withheld = None, "not measured"
    elif not values:
        difference, withheld = None, "keys differ"
    elif len(values) > 1:  # no single number to compare with
        difference, withheld = None, "sources disagree"
    elif not row.full_samples:
        difference, withheld = None, "fewer samples"
    else:
        difference, withheld = own.mean - values.pop(), ""
    return Reported(tuple(published), row.rank_metric, key, difference, withheld)
