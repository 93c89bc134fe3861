"""Where boards are found, and what a published row becomes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from record_factory import on_disk, record

from cmbench.errors import UserError
from cmbench.leaderboard import boards
from cmbench.leaderboard.boards import (
    board_folders,
    find_folder,
    load_boards,
    record_folders,
    without_description,
)
from cmbench.leaderboard.published_files import check_published, load_published

ROOT = Path(__file__).parents[2]
BOARD = """\
schema_version = 1
dataset = "digits"
title = "Digits"
rank_metric = "fid"
description = "Our own records."
also = ["letters"]
notes = ["A note."]

[tables.one]
title = "Table 1"
rows = 3

[protocols.known]
title = "Known"
reason = "equal keys"
key = "fid:key"

[protocols.unknown]
title = "Unknown"
reason = "not stated"
"""
HEADER = (
    "table,block,method,joins,reference,arxiv,year,family,conditioning,nfe,fid,is,precision,recall,"
    "parameters,marks,protocol,source,place,note"
)
ROWS = """\
one,Block,Method A,alpha,"A et al., 2022",2203.00001,2022,diffusion,conditional,63x2,2.50,9.8,\
0.7,,1.5B,teacher; starred,known,paper,p. 3,n
one,Block,Method B,,"B et al., 2020",,2020,GAN,unconditional,1,,10,,,280M,,known,paper,p. 4,
one,Block,Method C,,"C et al., 2021",,2021,flow,,2,3.0,,,0.5,,,unknown,paper,p. 5,
"""


def written(folder: Path, board: str = BOARD, rows: str | None = ROWS) -> Path:
    folder.mkdir(parents=True)
    (folder / "board.toml").write_text(board)
    if rows is not None:
        (folder / "published.csv").write_text(f"{HEADER}\n{rows}")
    return folder


# ---- folders ------------------------------------------------------------------------------------


def test_the_folder_of_boards_is_given_here_or_the_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_folder(tmp_path) == tmp_path
    assert find_folder() == ROOT / "leaderboards"
    (tmp_path / "leaderboards").mkdir()
    assert find_folder() == ROOT / "leaderboards", "an empty folder has no boards"
    written(tmp_path / "leaderboards" / "digits")
    assert find_folder() == Path("leaderboards")
    missing = tmp_path / "missing"
    with pytest.raises(UserError) as raised:
        find_folder(missing)
    assert str(raised.value) == (
        f"leaderboards folder {missing}: is not a folder; allowed: a folder with "
        "<dataset>/board.toml; check --leaderboards"
    )
    monkeypatch.setattr(boards.cmbench, "__file__", str(tmp_path / "site" / "cmbench" / "x.py"))
    shutil.rmtree(tmp_path / "leaderboards")
    assert find_folder() is None
    written(tmp_path / "site" / "cmbench_leaderboards" / "digits")
    assert find_folder() == tmp_path / "site" / "cmbench_leaderboards", "of an installed package"


def test_boards_and_records_by_folder(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    (tmp_path / "c").mkdir()
    on_disk(tmp_path / "b" / "records", [record()])
    on_disk(tmp_path / "c" / "records", [record()])
    (tmp_path / "a" / "records").write_text("no folder")
    assert board_folders(tmp_path) == [first, second]
    assert record_folders(tmp_path) == {n: tmp_path / n / "records" for n in ("b", "c")}


def test_a_board_is_found_by_each_of_its_datasets(tmp_path: Path) -> None:
    written(tmp_path / "digits")
    found = load_boards(tmp_path)
    assert list(found) == ["digits", "letters"]
    assert found["digits"] is found["letters"]
    assert load_boards(None) == {}
    bare = without_description(found["digits"])
    assert (bare.board.description, bare.board.title) == ("", "Digits")
    assert (bare.rows, found["digits"].board.description) == (
        found["digits"].rows,
        "Our own records.",
    )
    (tmp_path / "digits" / "published.csv").unlink()
    with pytest.raises(UserError, match="published rows: "):
        load_boards(tmp_path)


# ---- rows ---------------------------------------------------------------------------------------


def test_what_a_published_row_becomes(tmp_path: Path) -> None:
    published = load_published(written(tmp_path / "digits"))
    first, second, third = published.as_rows()
    assert (first.kind, first.dataset, first.method, first.title) == (
        "reported",
        "digits",
        "alpha",
        "Method A",
    )
    assert (first.family, first.reference, first.year) == ("diffusion", "A et al., 2022", 2022)
    assert (first.arxiv, second.arxiv) == ("2203.00001", "")
    assert (first.nfe, first.nfe_text, first.parameters) == (126, "63×2", 1_500_000_000)
    assert (first.marks, first.note) == (("teacher", "starred"), "n")
    assert first.protocol == ("Known", "equal keys")
    assert first.details == {
        "arXiv": "2203.00001",
        "source": "paper",
        "place": "p. 3",
        "table": "Table 1",
        "block": "Block",
        "protocol": "Known: equal keys",
        "marks": "teacher, starred",
    }
    assert first.rank_metric == "fid"
    found = first.measurements
    assert list(found) == ["fid", "is", "precision"]
    assert [(m.mean, m.text, m.key, m.higher_is_better) for m in found.values()] == [
        (2.5, "2.50", "fid:key", False),
        (9.8, "9.8", "", True),
        (0.7, "0.7", "", True),
    ]
    assert (found["fid"].interval.low, found["fid"].interval.high) == (None, None)
    assert (found["fid"].interval.seeds, first.seeds) == (0, 0)
    assert [u.value for u in found["fid"].units] == [2.5]
    assert (second.method, second.year, second.parameters) == ("Method B", 2020, 280_000_000)
    assert (second.rank_measurement, second.measurements["is"].mean) == (None, 10.0)
    assert [row.conditional for row in (first, second, third)] == [True, False, None]
    assert third.measurements["fid"].key == "", "a protocol without a key"
    assert third.parameters is None
    assert {row.dataset for row in published.as_rows("letters")} == {"letters"}
    assert [r.id for r in published.as_rows("letters")] == [r.id for r in published.as_rows()]


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("table", "two"),
        ("block", "Other"),
        ("method", "Other"),
        ("nfe", "3"),
        ("conditioning", "conditional"),
        ("fid", "3.1"),
        ("is", "9"),
        ("parameters", "1M"),
        ("marks", "starred"),
    ],
)
def test_what_sets_published_rows_apart(tmp_path: Path, column: str, text: str) -> None:
    cells = dict(zip(HEADER.split(","), next(csv.reader([ROWS.splitlines()[2]])), strict=True))
    assert cells[column] != text
    board = BOARD.replace("rows = 3", "rows = 1")
    other = board + '\n[tables.two]\ntitle = "Table 2"\nrows = 1\n'
    other = other.replace("rows = 1\n", "", 1).replace('title = "Table 1"\n', "", 1)
    other = other.replace("[tables.one]\n", "", 1)
    first = load_published(written(tmp_path / "one" / "digits", board, ROWS.splitlines()[2] + "\n"))
    line = ",".join(f'"{cell}"' for cell in (cells | {column: text}).values()) + "\n"
    changed = other if column == "table" else board
    second = load_published(written(tmp_path / "two" / "digits", changed, line))
    assert first.as_rows()[0].id != second.as_rows()[0].id


def test_what_does_not_set_published_rows_apart(tmp_path: Path) -> None:
    board = BOARD.replace("rows = 3", "rows = 1")
    line = ROWS.splitlines()[2]
    first = load_published(written(tmp_path / "one" / "digits", board, line + "\n"))
    other = line.replace("C et al.", "D et al.").replace("p. 5", "p. 6").replace("2021", "2020")
    second = load_published(written(tmp_path / "two" / "digits", board, other + "\n"))
    assert first.as_rows()[0].id == second.as_rows()[0].id


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("rows = 3", "rows = 0", "tables.one.rows"),
        ("rows = 3", "rows = 3\nmore = 1", "tables.one.more"),
        ('key = "fid:key"', 'keys = "fid:key"', "protocols.known.keys"),
        ("schema_version = 1", "schema_version = 2", "schema_version"),
        ('title = "Digits"', "", "title"),
        ('title = "Digits"', 'title = "Digits"\nother = 1', "other"),
    ],
)
def test_a_bad_board_names_its_field(tmp_path: Path, old: str, new: str, field: str) -> None:
    folder = written(tmp_path / "digits", BOARD.replace(old, new))
    published, problems = check_published(folder)
    assert published is None
    assert (problems[0].file, problems[0].field) == (folder / "board.toml", field)


def test_a_board_without_tables_needs_no_rows(tmp_path: Path) -> None:
    bare = BOARD.partition("[tables")[0]
    assert load_published(written(tmp_path / "a" / "digits", bare, None)).rows == ()
    with pytest.raises(UserError, match=r"published\.csv line 0.*cannot be read"):
        load_published(written(tmp_path / "b" / "digits", rows=None))


@pytest.mark.parametrize(
    ("header", "field"),
    [
        (HEADER + ",zzz", "zzz"),
        (HEADER.removesuffix(",note"), "note"),
        (HEADER.replace("table,block", "block,table"), "order of columns"),
        ("", "arxiv"),
    ],
)
def test_a_wrong_header_names_the_column(tmp_path: Path, header: str, field: str) -> None:
    folder = written(tmp_path / "digits")
    (folder / "published.csv").write_text(f"{header}\n{ROWS}" if header else "")
    published, problems = check_published(folder)
    assert published is None
    first = problems[0]
    assert (first.line, first.field) == (1, field)
    assert first.message == f"the header must be {HEADER}"
