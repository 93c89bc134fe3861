"""Which numbers are printed in bold: the best of their group, ties included.

Measured rows are best where no row is significantly better (Holm over all pairs, so that in the
rank's metric exactly the rows that may be first are bold); reported ones, which have no seeds,
where no printed number is better. Rows of one seed are never bold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cmbench.leaderboard.ranking import Group, rank_group, significant
from cmbench.leaderboard.rows import REPORTED, Measurement, Row

Member = tuple[str, Measurement]


def best_values(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Return ``(row id, metric)`` of the best values among rows of one rank group.

    Rows compare only where the metric's key is equal too. A group in which all tie has no best.
    """
    groups: dict[tuple[bool, str, str, *Group], list[Member]] = {}
    for row in rows:
        if row.nfe is None:  # rows of unknown cost have nothing to be the best of
            continue
        reported = row.kind == REPORTED
        for name, measurement in row.measurements.items():
            if reported or measurement.interval.seeds > 1:
                key = (reported, name, measurement.key, *rank_group(row))
                groups.setdefault(key, []).append((row.id, measurement))
    best = set()
    for key, members in groups.items():
        winners = _printed_best(members) if key[0] else _unbeaten(members)
        if len(winners) < len(members):
            best |= {(identity, key[1]) for identity in winners}
    return best


def _printed_best(members: Sequence[Member]) -> list[str]:
    choose = max if members[0][1].higher_is_better else min
    top = choose(measurement.mean for _, measurement in members)
    return [identity for identity, m in members if m.mean == top]


def _unbeaten(members: Sequence[Member]) -> list[str]:
    better, _ = significant([measurement for _, measurement in members])
    return [identity for (identity, _), count in zip(members, better) if count == 0]
