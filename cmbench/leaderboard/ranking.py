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

from cmbench.leaderboard.rows import REPORTED, Measurement, Row
from cmbench.leaderboard.sections import Section
from cmbench.leaderboard.significance import holm, pairwise_p

ALPHA = 0.05
ONE_SEED = "one seed"
ALONE = "nothing to rank against"


@dataclass(frozen=True)
class Rank:
    """Where a row stands in its group of ``size`` ranked rows, or why it has no rank."""

    low: int | None = None
    high: int | None = None
    size: int = 0
    reason: str = ""

    @property
    def text(self) -> str:
        """``1``, ``2–4``, or a dash."""
        if self.low is None:
            return "–"
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


Group = tuple[int | None, bool | None, str]


def rank_group(row: Row) -> Group:
    """Return what rows must share to be ranked with each other inside a section."""
    return (row.nfe, row.conditional, row.dtype)


def rank_section(section: Section) -> dict[str, Rank]:
    """Return the rank of every row of ``section`` by row id."""
    if not section.ranked:
        return {row.id: Rank(reason=section.title) for row in section.rows}
    groups: dict[Group, list[Row]] = {}
    ranks = {}
    for row in section.rows:
        if row.kind == REPORTED:
            ranks[row.id] = Rank(reason="reported: no seeds to compare")
        elif row.nfe is None:  # equal cost cannot be assumed
            ranks[row.id] = Rank(reason="NFE not stated")
        elif row.seeds < 2:
            ranks[row.id] = Rank(reason=ONE_SEED)
        else:
            groups.setdefault(rank_group(row), []).append(row)
    for rows in groups.values():
        ranks.update(_rank(rows))
    return ranks


def _rank(rows: Sequence[Row]) -> dict[str, Rank]:
    if len(rows) == 1:
        return {rows[0].id: Rank(size=1, reason=ALONE)}
    found = [row.rank_measurement for row in rows]
    measurements = [m for m in found if m is not None]
    assert len(measurements) == len(rows)
    better, worse = significant(measurements)
    size = len(rows)
    return {row.id: Rank(1 + better[i], size - worse[i], size) for i, row in enumerate(rows)}


def significant(measurements: Sequence[Measurement]) -> tuple[list[int], list[int]]:
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
