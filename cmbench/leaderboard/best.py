"""Which numbers are printed in bold: the best of their group, ties included."""

from __future__ import annotations

from collections.abc import Iterable

from cmbench.leaderboard.rows import Measurement, Row


def best_values(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Return ``(row id, metric)`` of the best means among rows of equal NFE and conditioning.

    Rows compare only where the metric's key is equal too. Equal means are all best; a group of one
    row, or one in which all are equal, has no best.
    """
    groups: dict[tuple[object, ...], list[tuple[str, Measurement]]] = {}
    for row in rows:
        for name, measurement in row.measurements.items():
            group = (name, measurement.key, row.nfe, row.conditional)
            groups.setdefault(group, []).append((row.id, measurement))
    best = set()
    for key, members in groups.items():
        choose = max if members[0][1].higher_is_better else min
        top = choose(measurement.mean for _, measurement in members)
        if all(measurement.mean == top for _, measurement in members):
            continue
        best |= {(identity, str(key[0])) for identity, m in members if m.mean == top}
    return best
