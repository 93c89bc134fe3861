"""The answer of a board: methods by NFE with what may be best, and one sentence per NFE.

Pages, terminal and README draw the same: values with their intervals, and as best exactly the rows
of :func:`cmbench.leaderboard.best_groups.best_groups`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cmbench.leaderboard.best_groups import BestGroup, ComparedRow, bold_values
from cmbench.leaderboard.labels import short_labels
from cmbench.leaderboard.rows import REPORTED, Row
from cmbench.report.numbers import format_difference, format_mean

#: NFE of the first view of a board; other NFE are shown if it has none of these.
FIRST_NFES = (1, 2, 4, 8)


@dataclass(frozen=True)
class PivotCell:
    """The value of a line at one NFE, as it is printed.

    Args:
        text: ``1.27 ± 0.15``, or the number as its source printed it.
        best: whether the row may be the best of its NFE.
        ids: of the rows that it shows; several reported rows may share a name.
    """

    text: str = ""
    best: bool = False
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class PivotLine:
    """One configuration: its name without the sampler, the sampler, and a cell per NFE."""

    label: str
    sampler: str
    reported: bool
    cells: tuple[PivotCell, ...]


@dataclass(frozen=True)
class Pivot:
    """Methods by NFE, best mean first.

    Args:
        metric: that is shown.
        nfes: of the columns, ascending.
        lines: one per configuration.
        samplers: whether the sampler needs a column since it differs.
    """

    metric: str
    nfes: tuple[int, ...]
    lines: tuple[PivotLine, ...]
    samplers: bool


def pivot(rows: Iterable[Row], groups: Iterable[BestGroup], metric: str) -> Pivot:
    """Return the pivot of ``rows`` with a value of ``metric``; rows without an NFE are left out.

    Args:
        rows: those of one section, so that their values compare.
        groups: of all rows of the dataset.
        metric: to show.
    """
    found = [row for row in rows if row.nfe is not None and metric in row.measurements]
    labels, bold = short_labels(found, sampler=False), bold_values(groups)
    nfes = tuple(sorted({row.nfe for row in found if row.nfe is not None}))
    lines: dict[tuple[str, str, bool], dict[int, list[Row]]] = {}
    for row in found:
        line = lines.setdefault((labels[row.id], row.sampler, row.kind == REPORTED), {})
        line.setdefault(row.nfe or 0, []).append(row)

    def order(at: Mapping[int, Sequence[Row]]) -> tuple[tuple[bool, float], ...]:
        """Sort by the first NFE; lines without a value there come last."""
        means = (_best_mean(at.get(nfe, ()), metric) for nfe in nfes)
        return tuple((mean is None, mean or 0.0) for mean in means)

    ordered = sorted(lines.items(), key=lambda item: (order(item[1]), item[0]))
    return Pivot(
        metric=metric,
        nfes=nfes,
        lines=tuple(
            PivotLine(
                label, sampler, reported, tuple(_cell(at.get(n, ()), metric, bold) for n in nfes)
            )
            for (label, sampler, reported), at in ordered
        ),
        samplers=len({row.sampler for row in found if row.kind != REPORTED}) > 1,
    )


def _best_mean(rows: Sequence[Row], metric: str) -> float | None:
    """Return the best mean of rows, its sign such that lower is better."""
    found = [row.measurements[metric] for row in rows]
    return min((m.mean * (-1 if m.higher_is_better else 1) for m in found), default=None)


def _cell(rows: Sequence[Row], metric: str, bold: set[tuple[str, str]]) -> PivotCell:
    found = [row.measurements[metric] for row in rows]
    texts = dict.fromkeys(m.text or format_mean(m.interval) for m in found)
    best = any((row.id, metric) in bold for row in rows)
    return PivotCell("; ".join(texts), best, tuple(row.id for row in rows))


def first_nfes(nfes: Sequence[int]) -> tuple[int, ...]:
    """Return which NFE the first view shows: 1, 2, 4 and 8, or else the lowest four."""
    found = tuple(nfe for nfe in nfes if nfe in FIRST_NFES)
    return found or tuple(nfes[: len(FIRST_NFES)])


def group_text(group: BestGroup, labels: Mapping[str, str]) -> str:
    """Return a group as a sentence: the best row, what cannot be told from it, the best reported.

    ``NFE 2: best M 1.27 ± 0.15; cannot be told from it: N (+5 % [-6, +18])``.
    """
    parts = [] if group.best is None else _measured_parts(group, group.best, labels)
    if group.reported:
        names = ", ".join(dict.fromkeys(labels[row.id] for row in group.reported))
        text = group.reported[0].measurements[group.metric].text
        parts.append(f"best reported: {names} {text}".rstrip())
    return f"NFE {group.nfe}: {'; '.join(parts)}"


def _measured_parts(group: BestGroup, best: Row, labels: Mapping[str, str]) -> list[str]:
    value = format_mean(best.measurements[group.metric].interval)
    if not group.judged:
        word = "highest" if group.higher_is_better else "lowest"
        return [f"{word} {labels[best.id]} {value} (one seed: no verdict)"]
    parts = [f"best {labels[best.id]} {value}"]
    if group.members:
        members = ", ".join(_member_text(item, labels) for item in group.members)
        parts.append(f"cannot be told from it: {members}")
    elif group.compared:
        parts.append("all others are worse" if len(group.compared) > 1 else "the other is worse")
    if group.unjudged:
        names = ", ".join(labels[row.id] for row in group.unjudged)
        parts.append(f"no verdict, one seed: {names}")
    return parts


def _member_text(item: ComparedRow, labels: Mapping[str, str]) -> str:
    mark = ", unpaired" if item.difference.unpaired else ""
    told = format_difference(item.difference, interval=True)
    return f"{labels[item.row.id]} ({told}{mark})"
