"""What may be best in the terminal: tables of 80 columns, no value cut, the group of the page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_outcome import Outcome

from cmbench.cli import best
from cmbench.cli.best import print_best
from cmbench.cli.common import TABLE_WIDTH
from cmbench.cli.run_tables import print_table
from cmbench.leaderboard.best_groups import best_groups, bold_values
from cmbench.leaderboard.rows import aggregate
from cmbench.records.folders import read_records
from cmbench.records.record import Record

Command = Callable[..., Outcome]
BOARDS = str(Path(__file__).parents[2] / "leaderboards")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    found = read_records(Path(BOARDS) / "digits/records", "digits")
    return [item for _, item in found if isinstance(item, Record)]


def narrow(text: str) -> list[str]:
    lines = text.splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    return lines


def test_show_prints_sentences_and_pivot_in_80_columns(cmbench: Command) -> None:
    done = cmbench("leaderboard", "show", "digits", BOARDS)
    assert done.code == 0
    lines = narrow(done.out)
    assert lines[0].startswith("NFE 1: best ict-deep")
    (header,) = [line for line in lines if line.startswith("fd-digits")]
    assert header.split() == [
        "fd-digits",
        "sampler",
        "NFE",
        "1",
        "NFE",
        "2",
        "NFE",
        "4",
        "NFE",
        "8",
    ]
    (ect,) = [line.split() for line in lines if line.startswith("ect ")]
    assert ect == ["ect", "multistep", "1.86±0.16", "1.27±0.15*", "0.93±0.13*", "0.75±0.21*"]
    assert lines[-2] == best.LEGENDS[0]
    assert lines[-1] == "other NFE, shown by --nfe N: 3, 5, 9, 17, 35"


def test_the_marks_are_the_groups_of_the_page(
    records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    print_best(records)
    lines = narrow(capsys.readouterr().out)
    rows = aggregate((Path(f"{r.cell}.json"), r) for r in records)
    bold = bold_values(best_groups(rows, "fd-digits"))
    tables = [line for line in lines if "±" in line and not line.startswith(("NFE", " "))]
    assert sum(line.count("*") for line in tables) == len(bold)
    assert sum(line.count("±") for line in tables) == len(rows), "no value is cut"


def test_reported_boards_show_what_is_printed(cmbench: Command) -> None:
    lines = narrow(cmbench("leaderboard", "show", "imagenet512", BOARDS).out)
    assert lines[0].startswith("NFE 1: best reported: SiDA (EDM2-XXL) 1.366")
    assert best.LEGENDS[1] in lines
    assert best.LEGENDS[0] not in lines
    (line,) = [x for x in lines if x.startswith("sCD-XXL")]
    assert line.split() == ["sCD-XXL", "2.28", "1.88*", "-"]


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet64"])
def test_one_nfe_has_every_row_and_the_columns_that_fit(cmbench: Command, dataset: str) -> None:
    done = cmbench("leaderboard", "show", dataset, BOARDS, "--nfe", "1")
    lines = narrow(done.out)
    assert lines[0].startswith("NFE 1: best ")
    assert any(line.startswith("method ") for line in lines)


def test_a_drawn_table_fits_too(
    records: list[Record], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(TABLE_WIDTH))
    print_best(records)
    out = capsys.readouterr().out
    assert "…" not in out
    for value in ("1.27±0.15*", "21.5±5.4", "0.502±"):
        assert value in out


def test_the_table_of_cells_has_the_metrics_that_fit(
    records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(records, ("fd-digits", "precision", "recall", "density", "coverage", "is", "kd"))
    lines = narrow(capsys.readouterr().out)
    assert lines[0].split()[:5] == ["method", "seed", "NFE", "fd-digits", "precision"]
    long = [
        record.model_copy(update={"name": "m" * 60, "label": "m" * 60}) for record in records[:2]
    ]
    print_table(long, ("fd-digits", "precision"))
    assert "fd-digits" in capsys.readouterr().out, "the first metric is never dropped"
