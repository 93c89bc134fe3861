"""A workspace's page shows the reference records of a board beside its own, as rows apart."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner
from record_factory import metric, on_disk, record, sweep

from cmbench.cli.leaderboard import leaderboard
from cmbench.cli.report import report
from cmbench.leaderboard.rows import REFERENCE, aggregate, reference_rows
from cmbench.records.folders import ReadRecord
from cmbench.records.record import Record
from cmbench.report.page import build_page


def cells(records: Iterable[Record]) -> list[tuple[Path, Record]]:
    return [(Path(f"{item.cell}.json"), item) for item in records]


def shifted(records: Iterable[Record]) -> list[Record]:
    """Return the same cells with other numbers, as another machine gets them."""
    return [
        item.model_copy(
            update={
                "metrics": {
                    name: metric.model_copy(update={"value": (metric.value or 0.0) * 1.1})
                    for name, metric in item.metrics.items()
                }
            }
        )
        for item in records
    ]


def test_seeds_of_reference_records_never_count_as_own_ones() -> None:
    shipped = sweep(("alpha", "beta"), (1, 2), 4)
    own = shifted(sweep(("alpha",), (1, 2), 2))
    found: list[ReadRecord] = [*cells(own)]
    page = build_page("digits", found, None, {}, "", cells(shipped))
    assert {(row.method, row.kind, row.nfe, row.seeds) for row in page.rows} == {
        ("alpha", "measured", 1, 2),
        ("alpha", "measured", 2, 2),
        *((name, REFERENCE, nfe, 4) for name in ("alpha", "beta") for nfe in (1, 2)),
    }
    assert len({row.id for row in page.rows}) == len(page.rows)
    # One ranked section: they compare. Every name says which is which.
    assert len(page.sections) == 1
    names = {page.short_labels[row.id] for row in page.rows}
    assert names == {"alpha, measured", "alpha, reference", "beta, reference"}
    assert (page.summary()["measured"], page.summary()["reference"]) == (2, 4)
    own_only = build_page("digits", cells(own), None, {}, "")
    assert {r.id for r in own_only.rows} == {r.id for r in page.rows if r.kind != REFERENCE}


def test_own_rows_come_first_where_reference_rows_do_not_compare_with_them() -> None:
    """As after a run with fewer samples: another metric key."""
    shipped = sweep(("alpha", "beta", "gamma"), (1, 2, 4), 4)
    metrics = {"fd-digits": metric(3.0, key="fd-digits|another|n100")}
    own = [record("alpha", seed=seed, metrics=metrics) for seed in range(2)]
    page = build_page("digits", cells(own), None, {}, "", cells(shipped))
    assert [item.section.ranked for item in page.sections] == [True, True]
    assert [row.kind for row in page.sections[0].section.rows] == ["measured"]
    assert [line.label for line in page.pivots[0].pivot.lines] == ["alpha"]
    assert [part.best.name for part in page.cards[0].measured] == ["alpha, measured"]


def test_reference_records_that_the_workspace_holds_stand_there_once() -> None:
    shipped = sweep(("alpha",), (1,), 3)
    assert reference_rows(cells(shipped), cells(shipped)) == []
    assert len(reference_rows(cells(shipped), cells(shipped[:2]))) == 1
    assert len(reference_rows(cells(shipped), cells(shifted(shipped)))) == 1
    assert len(aggregate(cells(shipped))) == 1


def test_report_overlays_the_boards_records(tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    for name in ("digits", "gmm"):
        on_disk(boards / name / "records", sweep(("beta",), (1,), 3, dataset=name))
    (boards / "digits" / "records" / "torn.json").write_text("{")
    on_disk(tmp_path / "own" / "records" / "digits", sweep(("alpha",), (1,), 2))
    result = CliRunner().invoke(
        report, ["-w", str(tmp_path / "own"), "--leaderboards", str(boards)], standalone_mode=False
    )
    assert result.return_value == 1  # the torn record of the board
    out = tmp_path / "own" / "reports"
    assert not (out / "gmm.html").exists()  # no records of its own
    rows = list(csv.DictReader((out / "digits.csv").open()))
    assert {(row["method"], row["kind"]) for row in rows} == {
        ("alpha", "measured"),
        ("beta", "reference"),
    }
    html = (out / "digits.html").read_text()
    assert "Reference rows are runs that the board ships" in html
    assert "<b>torn.json</b>: " in html
    assert 'data-label="Reference">1<' in (out / "index.html").read_text()


def test_boards_are_shown_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(leaderboard, ["show", "digits"], standalone_mode=False)
    assert result.return_value == 0
    assert "NFE 1: best " in result.stdout
    on_disk(tmp_path / "cmbench" / "records" / "digits", sweep(("alpha",), (1,), 2))
    done = CliRunner().invoke(
        report, ["-w", str(tmp_path / "cmbench"), "--dataset", "digits"], standalone_mode=False
    )
    assert done.return_value == 0
    text = (tmp_path / "cmbench" / "reports" / "digits.csv").read_text()
    assert ",reference," in text
    assert "alpha" in text
