"""One dataset's page as data: rows in sections, printed cells, pictures, what went wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cmbench import __version__
from cmbench.errors import UserError
from cmbench.leaderboard.best_groups import PROCEDURE, BestGroup, best_groups, bold_values
from cmbench.leaderboard.costs import CostChart, cost_charts
from cmbench.leaderboard.details import Floor, floor_of
from cmbench.leaderboard.floors import marked_by_floor
from cmbench.leaderboard.joins import Reported, join_reported
from cmbench.leaderboard.labels import row_labels, short_labels
from cmbench.leaderboard.published import Board, Published
from cmbench.leaderboard.ranking import positions
from cmbench.leaderboard.rows import (
    REFERENCE,
    REPORTED,
    Row,
    aggregate,
    conditioning,
    reference_rows,
    unfinished,
)
from cmbench.leaderboard.sections import Section, holds_own, sections
from cmbench.records.folders import ReadRecord
from cmbench.records.record import Record
from cmbench.report.cards import Card, cards
from cmbench.report.cells import TableCell
from cmbench.report.columns import Column, Findings, metric_title, table_columns
from cmbench.report.csvtable import csv_cells, csv_header
from cmbench.report.gallery import Gallery, build_gallery
from cmbench.report.paths import without_paths
from cmbench.report.pivot import Pivot, PivotLine, first_nfes, pivot


@dataclass(frozen=True)
class Line:
    """One row with its printed cells, in column order."""

    row: Row
    index: int
    section: str
    cells: tuple[TableCell, ...]


@dataclass(frozen=True)
class TableSection:
    """A section with its printed lines."""

    section: Section
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class PivotPart:
    """Methods by NFE of rows that compare, with the places of the columns that the page shows."""

    title: str
    pivot: Pivot
    places: tuple[int, ...]

    @property
    def shown(self) -> list[PivotLine]:
        """The lines with a value in the columns that the page shows."""
        return [x for x in self.pivot.lines if any(x.cells[place].text for place in self.places)]


@dataclass(frozen=True)
class Filter:
    """One menu of check boxes."""

    key: str
    title: str
    values: Sequence[str]


@dataclass(frozen=True)
class Page:
    """Everything that the templates of one dataset see."""

    dataset: str
    columns: Sequence[Column]
    sections: Sequence[TableSection]
    unfinished: Sequence[tuple[Path, Record]]
    unreadable: Sequence[tuple[Path, str]]
    gallery: Gallery
    labels: Mapping[str, str]
    floors: Sequence[Floor]
    rank_metric: str
    command: str
    reported: Mapping[str, Reported]
    #: What is best by ``rank_metric``: what cards and pivot show.
    groups: Sequence[BestGroup] = ()
    #: Quality against each cost.
    costs: Sequence[CostChart] = ()
    board: Board | None = None
    version: str = __version__
    #: How ``groups`` and bold numbers are found, for readers.
    procedure: str = " ".join(PROCEDURE)

    def summary(self) -> dict[str, object]:
        """What the index shows, without holding on to the page."""
        return {
            "dataset": self.dataset,
            "title": self.title,
            "rank_metric": self.rank_metric,
            "rank_title": metric_title(self.rank_metric),
            "measured": sum(row.kind not in (REFERENCE, REPORTED) for row in self.rows),
            "reference": sum(row.kind == REFERENCE for row in self.rows),
            "reported": sum(row.kind == REPORTED for row in self.rows),
            "unfinished": len(self.unfinished),
            "unreadable": len(self.unreadable),
            "cards": self.cards,
        }

    @property
    def title(self) -> str:
        """The board's title, or the dataset's name."""
        return self.board.title if self.board is not None else self.dataset

    @property
    def paragraphs(self) -> list[str]:
        """The board's description, split at blank lines."""
        text = self.board.description if self.board is not None else ""
        return [part.strip() for part in text.split("\n\n") if part.strip()]

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Description and notes of the board, each as its one line and what folds behind it."""
        notes = self.board.notes if self.board is not None else ()
        return [_folded(text) for text in (*self.paragraphs, *notes)]

    @cached_property
    def cards(self) -> list[Card]:
        """What is best at the first NFE."""
        return cards(self.groups, self.short_labels)

    @property
    def references(self) -> bool:
        """Whether any row is one of a board's reference records."""
        return any(row.kind == REFERENCE for row in self.rows)

    @property
    def reports(self) -> bool:
        """Whether any row is a reported one."""
        return any(row.kind == REPORTED for row in self.rows)

    @property
    def rank_title(self) -> str:
        """The rank metric as readers know it."""
        return metric_title(self.rank_metric)

    @cached_property
    def pivots(self) -> list[PivotPart]:
        """Methods by NFE: the first section of measured rows, then all that was reported."""
        measured = [
            (item.section.title, rows)
            for item in self.sections
            if (rows := [row for row in item.section.rows if row.kind != REPORTED])
        ]
        reported = [row for row in self.rows if row.kind == REPORTED]
        parts = [*measured[:1], *([("Reported by their authors", reported)] if reported else [])]
        made = ((title, pivot(rows, self.groups, self.rank_metric)) for title, rows in parts)
        return [PivotPart(title, found, _places(found.nfes)) for title, found in made if found.nfes]

    @property
    def csv_header(self) -> list[str]:
        """Column names of the CSV: plain numbers, so metrics have mean, low, high, n and values."""
        return csv_header(self.columns)

    def csv_cells(self, line: Line) -> list[object]:
        """The CSV's cells of one line."""
        return csv_cells(line.row, line.section, line.cells, self.columns)

    @cached_property
    def rows(self) -> list[Row]:
        """All rows in the order of the page."""
        return [line.row for line in self.lines]

    @cached_property
    def short_labels(self) -> dict[str, str]:
        """Names for cards, which tell rows of one NFE apart."""
        return short_labels(self.rows)

    @cached_property
    def lines(self) -> list[Line]:
        """All lines in the order of the page."""
        return [line for section in self.sections for line in section.lines]

    @property
    def filters(self) -> list[Filter]:
        """What the reader can filter by: everything with at least two values."""
        rows = self.rows
        found = [
            Filter("family", "Family", sorted({row.family or "other" for row in rows})),
            Filter("kind", "Kind", sorted({row.kind for row in rows})),
            Filter(
                "table",
                "Source table",
                list(dict.fromkeys(t for r in rows for t in source_tables(r))),
            ),
            Filter("conditional", "Labels", sorted({conditioning_filter(row) for row in rows})),
            Filter("nfe", "NFE", [t for _, t in sorted({_nfe_filter(row) for row in rows})]),
        ]
        return [item for item in found if len(item.values) > 1]

    @property
    def shown(self) -> list[tuple[int, Column]]:
        """Index and column of those visible from the start."""
        return [(i, c) for i, c in enumerate(self.columns) if c.shown]


def build_page(
    dataset: str,
    found: Iterable[ReadRecord],
    published: Published | None,
    extra_columns: Mapping[str, str],
    command: str,
    references: Iterable[ReadRecord] = (),
) -> Page:
    """Aggregate, sort into sections and format the rows of one dataset.

    ``references`` are a board's reference records beside the records ``found``: rows apart.
    """
    records, unreadable = _readable(found)
    shipped, unreadable_references = _readable(references)
    printed = published.as_rows(dataset) if published is not None else []
    rows = marked_by_floor([*aggregate(records), *reference_rows(shipped, records), *printed])
    parts = sections(rows)
    reported = join_reported(rows)
    groups = best_groups(rows)
    columns = table_columns(rows, extra_columns, Findings(positions(groups), reported))
    labels, rank_metric = row_labels(rows), _rank_metric(rows)
    return Page(
        dataset=dataset,
        columns=columns,
        sections=_lines(parts, columns, bold_values(groups)),
        groups=[group for group in groups if group.metric == rank_metric],
        unfinished=[
            (path, record.model_copy(update={"reason": without_paths(record.reason)}))
            for path, record in unfinished(records)
        ],
        unreadable=[*unreadable, *unreadable_references],
        gallery=build_gallery(rows, labels),
        labels=labels,
        floors=_floors(rows, rank_metric),
        rank_metric=rank_metric,
        command=without_paths(command),
        reported=reported,
        costs=cost_charts(rows, rank_metric),
        board=published.board if published is not None else None,
    )


def _readable(
    found: Iterable[ReadRecord],
) -> tuple[list[tuple[Path, Record]], list[tuple[Path, str]]]:
    """Return the records, and the reasons of those that cannot be read."""
    records: list[tuple[Path, Record]] = []
    unreadable: list[tuple[Path, str]] = []
    for path, item in found:
        if isinstance(item, UserError):
            unreadable.append((path, without_paths(str(item).replace(str(path), path.name))))
        else:
            records.append((path, item))
    return records, unreadable


#: More columns than these do not fit beside the methods' names; many steps are another question.
_MOST_NFES = 7


def _places(nfes: Sequence[int]) -> tuple[int, ...]:
    shown = nfes if len(nfes) <= _MOST_NFES and nfes[-1] < 20 else first_nfes(nfes)
    return tuple(nfes.index(nfe) for nfe in shown)


def _folded(text: str) -> tuple[str, str]:
    """Split a paragraph after its heading (``Tuning: …``) or its first sentence."""
    text = " ".join(text.split())
    head, _, rest = text.partition(": ")
    if len(head) > 60 or ". " in head or not rest:
        # A full stop after an initial ends no sentence.
        sentence = re.match(r"(.*?[^\s.]{2}\.) (.+)", text)
        head, rest = (sentence[1], sentence[2]) if sentence else (text, "")
    return head, rest


def _rank_metric(rows: Iterable[Row]) -> str:
    """Return the metric that most rows are ranked by, reference rows left out where others are."""
    known = [row for row in rows if row.rank_metric]
    ranked = [r.rank_metric for r in known if r.kind != REFERENCE or not holds_own(known)]
    return max(set(ranked), key=ranked.count) if ranked else ""


def _lines(
    found: Sequence[Section], columns: Sequence[Column], best: set[tuple[str, str]]
) -> list[TableSection]:
    result, index = [], 0
    for section in found:
        lines = []
        for row in section.rows:
            cells = tuple(_cell(row, column, best) for column in columns)
            lines.append(Line(row, index, section.title, cells))
            index += 1
        result.append(TableSection(section, tuple(lines)))
    return result


def _cell(row: Row, column: Column, best: set[tuple[str, str]]) -> TableCell:
    cell = column.cell(row)
    if column.metric and (row.id, column.metric) in best:
        return TableCell(cell.text, cell.sort, best=True)
    return cell


def _floors(rows: Iterable[Row], metric: str) -> list[Floor]:
    """Return the different floors of a metric in the rows, ascending."""
    found = {
        floor
        for row in rows
        for _, record in row.cells
        if metric in record.metrics and (floor := floor_of(record.metrics[metric])) is not None
    }
    # Floors that print alike are one, whatever the rounding of the machines.
    unique = {(floor.name, floor.number, floor.meaning): floor for floor in found}
    return sorted(unique.values(), key=lambda floor: (floor.value, floor.meaning))


def source_tables(row: Row) -> list[str]:
    """Return what the filter calls the tables that a reported row was read in."""
    return [*row.tables] or ["none: measured"]


def conditioning_filter(row: Row) -> str:
    """Return what the filter calls a row's conditioning."""
    return conditioning(row.conditional) or "not stated"


def _nfe_filter(row: Row) -> tuple[float, str]:
    return (float(row.nfe) if row.nfe is not None else float("inf"), row.nfe_text or "not stated")
