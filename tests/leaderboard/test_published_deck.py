"""Every row of every table of the deck, against a transcript of its slides.

``deck_tables.tsv`` holds the lines of the tables as they stand in the deck's text; it was copied
from there by a program and is never edited with the CSV files.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from cmbench.leaderboard.published import PublishedRow
from cmbench.leaderboard.published_files import load_published

BOARDS = Path(__file__).parents[2] / "leaderboards"
TRANSCRIPT = Path(__file__).with_name("deck_tables.tsv")

#: Table of the transcript -> board, and the columns of numbers after the NFE.
TABLES = {
    "cd": ("cifar10", ("fid", "is_")),
    "ct": ("cifar10", ("fid", "is_")),
    "ict": ("cifar10", ("fid", "is_")),
    "cm": ("imagenet64", ("fid", "precision", "recall")),
    "scm": ("imagenet64", ("fid",)),
    "cm-bedroom": ("lsun-bedroom256", ("fid", "precision", "recall")),
    "cm-cat": ("lsun-cat256", ("fid", "precision", "recall")),
    "scm-512": ("imagenet512", ("fid", "parameters")),
}
#: Headings inside a table of the transcript that begin another board's table.
SPLIT = {"ImageNet 64 × 64": "cm", "LSUN Bedroom 256 × 256": "cm-bedroom"}


class Printed(NamedTuple):
    """What a slide prints in one row."""

    method: str
    reference: str
    nfe: str
    numbers: tuple[str, ...]
    starred: bool
    lpips: bool
    reimplemented: bool


def _name(cell: str) -> tuple[str, str, bool, bool]:
    """Return method, reference, star and LPIPS mark of a first cell."""
    text = re.sub(r"</?b>|⇒", "", cell).replace("&amp;", "&").strip()
    starred, lpips = "*" in text, "(LPIPS)" in text
    text = text.replace("*", "").replace("(LPIPS)", "").replace("(ours)", "")
    found = re.search(r"\(([^()]*\d{4}[ab]?)\)\s*$", text)
    reference = found[1] if found else ""
    method = text[: found.start()] if found else text
    return " ".join(method.split()), reference, starred, lpips


def _column(lines: list[list[str]]) -> list[Printed]:
    """Return the rows of one column of a table: its first cell, NFE and numbers."""
    rows: list[Printed] = []
    for first, nfe, *numbers in lines:
        if not nfe or "METHOD" in first:
            continue
        plain = tuple(re.sub(r"</?b>", "", n) for n in numbers)
        # An empty first cell, or a remark on the row above, goes on with its method.
        again = not first or first.startswith("(reimpl")
        name = rows[-1][:2] if again else _name(first)[:2]
        marks = rows[-1][4:6] if again else _name(first)[2:]
        rows.append(Printed(*name, nfe.replace("×", "x"), plain, *marks, "reimpl" in first))
        if rows[-1].reimplemented:
            rows[-2] = rows[-2]._replace(reimplemented=True)
    return rows


def _transcript() -> dict[str, list[Printed]]:
    tables: dict[str, list[list[str]]] = {}
    name = ""
    for line in TRANSCRIPT.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            name = line[2:]
            continue
        cells = line.split("\t")
        name = SPLIT.get(re.sub(r"</?b>", "", cells[0]), name)
        tables.setdefault(name, []).append(cells)
    result = {}
    for table, (_, columns) in TABLES.items():
        width = 2 + len(columns)
        lines = [(cells + [""] * 2 * width)[: 2 * width] for cells in tables[table]]
        right = [cells[width:] for cells in lines]
        result[table] = _column([cells[:width] for cells in lines]) + _column(right)
    return result


DECK = _transcript()


#: What the board corrects: a slip, and one reference for each paper.
CORRECTED_METHODS = {"DiffT": "DiffiT"}
CORRECTED_REFERENCES = {"Brock, 2018": "Brock et al., 2019"}


def _corrected(row: Printed) -> Printed:
    # Letters after years tell papers of the slides' own bibliographies apart.
    reference = re.sub(r"(?<=\d)[a-d]$", "", row.reference)
    if row.method == "DFNO" and reference:
        reference = "Zheng et al., 2022"
    return row._replace(
        method=CORRECTED_METHODS.get(row.method, row.method),
        reference=CORRECTED_REFERENCES.get(reference, reference),
    )


DECK = {table: [_corrected(row) for row in rows] for table, rows in DECK.items()}


def board_rows(table: str) -> list[PublishedRow]:
    published = load_published(BOARDS / TABLES[table][0])
    return [row for _, row in published.rows if row.table == table]


def test_the_transcript_has_the_rows_counted_on_the_slides() -> None:
    assert {table: len(rows) for table, rows in DECK.items()} == {
        "cd": 15,
        "ct": 21,
        "ict": 34,
        "cm": 5,
        "scm": 20,
        "cm-bedroom": 9,
        "cm-cat": 7,
        "scm-512": 53,
    }


@pytest.mark.parametrize("table", list(TABLES))
def test_every_printed_number_is_the_boards(table: str) -> None:
    def numbers(row: PublishedRow) -> tuple[str, ...]:
        return tuple(getattr(row, column) for column in TABLES[table][1])

    board = Counter((r.method, r.nfe, numbers(r)) for r in board_rows(table))
    assert board == Counter((r.method, r.nfe, r.numbers) for r in DECK[table])


@pytest.mark.parametrize("table", list(TABLES))
def test_references_are_printed_as_on_the_slide(table: str) -> None:
    board = Counter((r.method, r.nfe, r.reference) for r in board_rows(table))
    # The deck's own methods have no reference in its tables; elsewhere it gives them one.
    printed = Counter((r.method, r.nfe, r.reference) for r in DECK[table] if r.reference)
    assert printed <= board
    for row in board_rows(table):
        assert str(row.year) in row.reference


@pytest.mark.parametrize("table", list(TABLES))
def test_marks_are_those_of_the_slide(table: str) -> None:
    star = "synthetic pairs" if table == "cd" else "starred"
    printed = Counter((r.method, r.nfe, r.starred, r.lpips, r.reimplemented) for r in DECK[table])
    board = Counter(
        (
            r.method,
            r.nfe,
            star in r.marks,
            "LPIPS-trained" in r.marks,
            "re-implementation" in r.marks,
        )
        for r in board_rows(table)
    )
    assert board == printed


def test_what_a_star_means_is_only_said_where_it_is_known() -> None:
    starred = [r for table in TABLES for r in board_rows(table) if "starred" in r.marks]
    assert {(r.table, r.method) for r in starred} == {("ict", "PD"), ("ict", "EDM")}
    assert all("no legend" in r.note for r in starred)
