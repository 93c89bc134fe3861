"""Ranks with intervals and ties.

Rows are ranked among those of equal NFE and conditioning in one section (equal metric keys, full
samples). A row's rank is one more than the number of rows that are significantly better; its
interval reaches to where the rows that are not significantly worse could push it. With Holm's
correction over all pairs of the group these intervals hold simultaneously (M. Mogstad et al. 2024,
"Inference for Ranks with Applications to Mobility across Neighbourhoods", Review of Economic
Studies 91). A single seed has no rank, and neither has a row alone in its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cmbench.leaderboard.rows import REPORTED, MetricSummary, Row
from cmbench.leaderboard.sections import Section
from cmbench.leaderboard.significance import holm, pairwise_p

ALPHA = 0.05


@dataclass(frozen=True)
class Rank:
    """Where a row stands in its group: from ``low`` (first is 1) to ``high``."""

    low: int
    high: int

    @property
    def text(self) -> str:
        """``1`` or ``2–4``."""
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


Group = tuple[int | None, bool | None, str]


def rank_group(row: Row) -> Group:
    """Return what rows must share to be ranked with each other inside a section."""
    return (row.nfe, row.conditional, row.dtype)


def rank_section(section: Section) -> dict[str, Rank]:
    """Return the ranks of the rows of ``section`` by row id.

    Rows without a rank are left out: reported ones (no seeds to compare), rows of one seed, rows
    whose NFE nobody stated (equal cost cannot be assumed), rows alone in their group, and all rows
    of a section that is not ranked.
    """
    groups: dict[Group, list[Row]] = {}
    for row in section.rows if section.ranked else ():
        if row.kind != REPORTED and row.nfe is not None and row.seeds > 1:
            groups.setdefault(rank_group(row), []).append(row)
    ranks = {}
    for rows in groups.values():
        if len(rows) > 1:
            ranks.update(_rank(rows))
    return ranks


def _rank(rows: Sequence[Row]) -> dict[str, Rank]:
    measured = [m for row in rows if (m := row.rank_measurement) is not None]
    better, worse = significant(measured)
    return {row.id: Rank(1 + better[i], len(rows) - worse[i]) for i, row in enumerate(rows)}


def significant(measurements: Sequence[MetricSummary]) -> tuple[list[int], list[int]]:
    """Return how many are significantly better, and how many worse, than each measurement.

    Holm's correction over all pairs; measurements of one metric under one key.
    """
    p_values = pairwise_p([m.units for m in measurements])
    adjusted = dict(zip(p_values, holm(list(p_values.values()))))
    better, worse = [0] * len(measurements), [0] * len(measurements)
    for (i, j), p in adjusted.items():
        if p > ALPHA:
            continue
        first_wins = (measurements[i].mean < measurements[j].mean) != (
            measurements[i].higher_is_better
        )
        winner, loser = (i, j) if first_wins else (j, i)
        better[loser] += 1
        worse[winner] += 1
    return better, worse


def rank_all(sections: Iterable[Section]) -> dict[str, Rank]:
    """Return the ranks of all sections together."""
    ranks: dict[str, Rank] = {}
    for section in sections:
        ranks.update(rank_section(section))
    return ranks
