"""Rows that score better than a perfect generator: marked, and ranked as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cmbench.leaderboard.details import Floor, floor_of
from cmbench.leaderboard.rows import Row

#: Standard deviations of a perfect generator's score by which a row must be better.
DEVIATIONS = 3.0


def marked_by_floor(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, those significantly beyond the floor of their metric key with a finding.

    The floor is that of the measured rows under the same key, hence for the same counts of images;
    reported rows under that key are marked by it too. An older record's floor, which is for other
    counts, marks nothing.
    """
    known: dict[str, tuple[Floor, float]] = {}
    for row in rows:
        for _, record in row.cells:
            metric = record.metrics.get(row.rank_metric)
            floor = floor_of(metric) if metric is not None else None
            if metric is None or floor is None or floor.samples != record.sampling.num_samples:
                continue
            spread = metric.standard_error if floor.std is None else floor.std
            if spread is not None and floor.splits != 1:
                known.setdefault(metric.key, (floor, spread))
    return [_marked(row, known) for row in rows]


def _marked(row: Row, known: dict[str, tuple[Floor, float]]) -> Row:
    found = row.rank_measurement
    if found is None or found.key not in known:
        return row
    floor, spread = known[found.key]
    beyond = (found.mean - floor.value) * (1 if found.higher_is_better else -1)
    if beyond <= DEVIATIONS * spread:
        return row
    side = "above the ceiling" if found.higher_is_better else "below the floor"
    return replace(row, findings=(*row.findings, side))
