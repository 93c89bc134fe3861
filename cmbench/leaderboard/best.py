"""Which numbers are printed in bold: the best of their group, ties included.

Measured rows are best where no row is significantly better (Holm over the comparisons with the
leader); reported ones, which have no seeds, where no printed number is better. Rows of one seed are
never bold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cmbench.leaderboard.bootstrap import holm, leader_p
from cmbench.leaderboard.ranking import ALPHA, rank_group
from cmbench.leaderboard.rows import REPORTED, Measurement, Row

Member = tuple[str, Measurement]


def best_values(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Return ``(row id, metric)`` of the best values among rows of equal NFE and conditioning.

    Rows compare only where the metric's key is equal too. A group in which all tie has no best.
    """
    groups: dict[tuple[bool, str, str, int | None, bool | None], list[Member]] = {}
    for row in rows:
        reported = row.kind == REPORTED
        for name, measurement in row.measurements.items():
            if reported or measurement.interval.seeds > 1:
                key = (reported, name, measurement.key, *rank_group(row))
                groups.setdefault(key, []).append((row.id, measurement))
    best = set()
    for key, members in groups.items():
        winners = _printed_best(members) if key[0] else _tied_with_leader(members)
        if len(winners) < len(members):
            best |= {(identity, key[1]) for identity in winners}
    return best


def _printed_best(members: Sequence[Member]) -> list[str]:
    choose = max if members[0][1].higher_is_better else min
    top = choose(measurement.mean for _, measurement in members)
    return [identity for identity, m in members if m.mean == top]


def _tied_with_leader(members: Sequence[Member]) -> list[str]:
    choose = max if members[0][1].higher_is_better else min
    leader = choose(members, key=lambda member: member[1].mean)
    others = [member for member in members if member[0] != leader[0]]
    p_values = leader_p(leader[1].units, [m.units for _, m in others])
    adjusted = iter(holm([p for p in p_values if p is not None]))
    tied = [leader[0]]
    for (identity, _), p in zip(others, p_values):
        if p is None or next(adjusted) > ALPHA:
            tied.append(identity)
    return tied
