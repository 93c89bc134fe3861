"""What may be best, in the terminal: one sentence per NFE, and methods by NFE."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cmbench.cli.common import TABLE_WIDTH, echo_table, table_width
from cmbench.cli.output import echo, echo_line
from cmbench.leaderboard.best_groups import BestGroup, best_groups
from cmbench.leaderboard.labels import short_labels
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.records.record import Record
from cmbench.report.cells import TableCell
from cmbench.report.page import Page
from cmbench.report.pivot import Pivot, PivotCell, first_nfes, group_text, pivot

#: What marks a value that may be best, and what stands where there is no value.
MARK, NOTHING = "*", "-"
#: What the mark means for measured rows, and for reported ones.
LEGENDS = (
    "* may be best: not told from the best mean of its NFE (paired t test, Holm)",
    "* of reported rows: the best printed number of its NFE",
)


def print_groups(groups: Iterable[BestGroup], rows: Sequence[Row]) -> None:
    """Print a sentence per group of one metric: the cards of the page.

    Args:
        groups: to print.
        rows: all rows of the dataset, for their names.
    """
    labels = short_labels(rows)
    for group in groups:
        told = group_text(group, labels)
        for line in textwrap.wrap(
            told,
            TABLE_WIDTH,
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        ):
            echo_line(line)


def print_pivot(found: Pivot, nfes: Sequence[int], title: str = "") -> None:
    """Print methods by NFE as tables of at most 80 columns, each with as many NFE as fit."""
    if not nfes or not found.lines:
        return
    tables = list(_tables(found, nfes))
    for header, lines in tables:
        echo_table(header, lines, title=title)
        echo()
    kinds = {line.reported for line in found.lines if any(cell.best for cell in line.cells)}
    for reported in sorted(kinds):
        echo(LEGENDS[reported])


def _tables(found: Pivot, nfes: Sequence[int]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield header and lines of each table; lines without a value in it are left out."""
    left = list(nfes)
    while left:
        taken = next(
            n
            for n in range(len(left), 0, -1)
            if n == 1 or table_width(*_table(found, left[:n])) <= TABLE_WIDTH
        )
        yield _table(found, left[:taken])
        left = left[taken:]


def _table(found: Pivot, nfes: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    places = [found.nfes.index(nfe) for nfe in nfes]
    cells = [(line, [line.cells[place] for place in places]) for line in found.lines]
    names = [found.metric, *(["sampler"] if found.samplers else [])]
    lines = [
        [line.label, *([line.sampler] if found.samplers else []), *map(_marked, shown)]
        for line, shown in cells
        if any(cell.text for cell in shown)
    ]
    return [*names, *(f"NFE {nfe}" for nfe in nfes)], lines


def print_best(records: Sequence[Record]) -> None:
    """Print pivot and sentences of a sweep's records."""
    rows = [
        row
        for row in aggregate((Path(f"{record.cell}.json"), record) for record in records)
        if row.rank_measurement is not None
    ]
    if not rows:
        return
    metric = rows[0].rank_metric
    groups = best_groups(rows, metric)
    found = pivot(rows, groups, metric)
    echo()
    print_pivot(found, found.nfes)
    print_groups(groups, rows)


def print_page(page: Page) -> None:
    """Print what a page shows first: sentences, then the pivot of every section."""
    nfes = first_nfes(sorted({group.nfe for group in page.groups}))
    print_groups([group for group in page.groups if group.nfe in nfes], page.rows)
    others: set[int] = set()
    for item in page.sections:
        section = item.section
        found = pivot(section.rows, page.groups, section.metric or page.rank_metric)
        shown = first_nfes(found.nfes)
        others |= set(found.nfes) - set(shown)
        if shown:
            echo()
            print_pivot(found, shown, section.title)
    if others:
        echo_line(f"other NFE, shown by --nfe N: {', '.join(map(str, sorted(others)))}")


def print_rows_at(page: Page, nfe: int) -> None:
    """Print every row of an NFE, section by section, with as many columns as fit."""
    for item in page.sections:
        lines = [line for line in item.lines if line.row.nfe == nfe]
        if not lines:
            continue
        labels = short_labels([line.row for line in lines])
        columns = [i for i, column in page.shown if column.key not in ("method", "nfe")]
        columns = [i for i in columns if any(line.cells[i].text for line in lines)]
        while True:
            header = ["method", *(page.columns[i].title for i in columns)]
            rows = [[labels[x.row.id], *(_marked(x.cells[i]) for i in columns)] for x in lines]
            if len(columns) < 2 or table_width(header, rows) <= TABLE_WIDTH:
                break
            columns.pop()
        echo()
        echo_table(header, rows, title=item.section.title)


def _marked(cell: PivotCell | TableCell) -> str:
    """Return a cell's text without spaces around its ±, with the mark of what may be best."""
    text = cell.text.replace(" ± ", "±") or NOTHING
    return text + (MARK if cell.best else " " * len(MARK))
