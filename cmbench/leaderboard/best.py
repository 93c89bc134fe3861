"""Which numbers are printed in bold: the best of their group, including ties.

Among measured rows the best mean, and every row whose paired difference from it is not significant
at 5 %: one comparison per row, without correction. Bold shows where to look; claims need the rank's
interval, which is corrected over all pairs and which three seeds can seldom narrow. Reported rows
have no seeds: bold is the best printed number. Rows of one seed are never bold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cmbench.leaderboard.ranking import ALPHA, Group, rank_group
from cmbench.leaderboard.rows import REPORTED, MetricSummary, Row
from cmbench.leaderboard.significance import pairwise_p
from cmbench.metrics.values import is_approximate

Member = tuple[str, MetricSummary]


def best_values(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Return ``(row id, metric)`` of the best values among rows of one rank group.

    Rows compare only if the metric's key is equal too. A group in which all tie has no best.
    """
    groups: dict[tuple[bool, str, str, *Group], list[Member]] = {}
    for row in rows:
        if row.nfe is None:  # equal cost cannot be assumed
            continue
        reported = row.kind == REPORTED
        for name, measurement in row.measurements.items():
            if is_approximate(measurement.key):
                continue
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
    """Return the best mean and the rows that do not differ significantly from it."""
    sign = -1 if members[0][1].higher_is_better else 1
    first = min(members, key=lambda member: sign * member[1].mean)
    return [
        member[0]
        for member in members
        if member is first or pairwise_p([first[1].units, member[1].units]).get((0, 1), 0.0) > ALPHA
    ]
