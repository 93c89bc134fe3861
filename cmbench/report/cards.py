"""The cards of a page: what is best at each of the first NFE, measured and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmbench.leaderboard.best_groups import BestGroup, ComparedRow
from cmbench.leaderboard.rows import Row, conditioning
from cmbench.leaderboard.sections import holds_own
from cmbench.report.numbers import format_difference, format_mean

#: NFE of the cards; if a board has none of these, its three lowest.
CARD_NFES = (1, 2, 4)


@dataclass(frozen=True)
class CardEntry:
    """A row on a card.

    Args:
        id: of the row.
        name: as charts and tables call it.
        value: mean with its interval; of rows that cannot be told from the best the difference.
        detail: interval of the difference, and whether the rows are unpaired.
    """

    id: str
    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class CardBest:
    """The best measured row of one group.

    Args:
        best: its value is a mean with interval.
        members: the rows that cannot be told from it, best mean first.
        condition: conditioning of the group, if the card has several groups.
        verdict: what else is to say of the group: one seed, or that all others are worse.
    """

    best: CardEntry
    members: tuple[CardEntry, ...]
    condition: str
    verdict: str


@dataclass(frozen=True)
class Card:
    """What is best at ``nfe``; both tuples are empty if no row has this NFE."""

    nfe: int
    measured: tuple[CardBest, ...]
    reported: tuple[CardEntry, ...]


def cards(groups: Sequence[BestGroup], labels: Mapping[str, str]) -> list[Card]:
    """Return a card for each of the first NFE; none if there is no group.

    Args:
        groups: of one metric.
        labels: names by row id.
    """
    if not groups:
        return []
    known = {group.nfe for group in groups}
    chosen = CARD_NFES if known & set(CARD_NFES) else sorted(known)[: len(CARD_NFES)]
    # Only rows of one protocol compare: that of the most rows, the user's own ones first.
    rows: dict[str, list[Row]] = {}
    for group in groups:
        rows.setdefault(group.key, []).extend(group.measured)
    key = max(rows, key=lambda name: (holds_own(rows[name]), len(rows[name])), default="")
    return [_card(n, [g for g in groups if g.nfe == n], key, labels) for n in chosen]


def _card(nfe: int, groups: Sequence[BestGroup], key: str, labels: Mapping[str, str]) -> Card:
    measured = [group for group in groups if group.best is not None and group.key == key]
    printed = {row.id: (row, group.metric) for group in groups for row in group.reported}
    return Card(
        nfe,
        tuple(
            _best(group, group.best, labels, len(measured) > 1)
            for group in measured
            if group.best is not None
        ),
        tuple(
            CardEntry(row.id, labels[row.id], row.measurements[metric].text)
            for row, metric in printed.values()
        ),
    )


def _best(group: BestGroup, best: Row, labels: Mapping[str, str], several: bool) -> CardBest:
    value = format_mean(best.measurements[group.metric].interval)
    members = tuple(_member(item, labels) for item in group.members)
    condition = conditioning(group.conditional) if several else ""
    return CardBest(CardEntry(best.id, labels[best.id], value), members, condition, _verdict(group))


def _verdict(group: BestGroup) -> str:
    if not group.judged:
        return "One seed: no verdict."
    if group.members or not group.compared:
        return ""
    return "All others are worse." if len(group.compared) > 1 else "The other row is worse."


def _member(item: ComparedRow, labels: Mapping[str, str]) -> CardEntry:
    short = format_difference(item.difference)
    interval = format_difference(item.difference, interval=True).removeprefix(short).strip()
    unpaired = "unpaired" if item.difference.unpaired else ""
    detail = " ".join(part for part in (interval, unpaired) if part)
    return CardEntry(item.row.id, labels[item.row.id], short, detail)
