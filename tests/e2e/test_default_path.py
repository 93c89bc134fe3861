"""The way of a new user: run, table, report, and run again, in processes of their own."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cmbench.plugin.manager import load_plugins
from cmbench.records.record import Record, read_record

#: Everything by default but the recipe and the number of samples.
COMMAND = ("run", "--recipe", "smoke", "--samples", "200")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CMBENCH_")}
    return subprocess.run(
        [sys.executable, "-m", "cmbench", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("new-user")


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, *COMMAND)


def rows(table: str) -> list[list[str]]:
    """The words of the first table: of the cells."""
    return [line.split() for line in table.partition("\n\n")[0].splitlines()]


def test_run_ends_with_a_table_and_the_path_of_a_report(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 0, first.stderr
    header, *body = rows(first.stdout)
    assert header == ["method", "seed", "NFE", "fd-digits", "precision", "images/s", "status"]
    name = load_plugins().default_method
    assert [(r[0], r[2], r[-1]) for r in body] == [(name, n, "finished") for n in "124"]
    page = Path("cmbench-out/reports/digits.html")
    assert first.stdout.splitlines()[-1] == f"report: {page}"
    assert (folder / page).is_file()
    assert "Traceback" not in first.stderr


def test_everything_lies_in_the_workspace(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert [p.name for p in folder.iterdir()] == ["cmbench-out"]
    out = folder / "cmbench-out"
    assert {p.name for p in out.iterdir()} == {"runs", "records", "reports", "cache"}
    assert len(list(out.glob("runs/digits/*/result.json"))) == 2, "the teacher and the student"


def test_each_cell_is_a_record_that_says_where_its_number_comes_from(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    paths = sorted((folder / "cmbench-out" / "records" / "digits").glob("*.json"))
    records = [read_record(path) for path in paths]
    assert len(records) == 3
    for record in records:
        assert isinstance(record, Record)
        assert record.sampling.nfe == record.sampling.nfe_measured
        assert record.training.teacher
        assert record.dataset.reference_count == 1797
        assert record.dataset.extractor_sha256
        assert record.metrics["fd-digits"].detail["floor"]["value"] > 0
        assert "--recipe smoke" in record.command
        assert any("200 samples instead of the protocol's" in w for w in record.warnings)


def test_the_report_needs_no_network_and_shows_every_cell(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    reports = folder / "cmbench-out" / "reports"
    html = (reports / "digits.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']https?:", html)
    with (reports / "digits.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) >= 3
    for kind in ("md", "tex"):
        assert load_plugins().default_method in (reports / f"digits.{kind}").read_text("utf-8")


def test_a_second_run_finds_every_cell_done(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    records = folder / "cmbench-out" / "records" / "digits"
    before = {p.name: p.read_bytes() for p in records.glob("*.json")}
    again = run(folder, *COMMAND)
    assert again.returncode == 0
    assert again.stdout == first.stdout
    assert "train " not in again.stderr
    assert "sample " not in again.stderr
    assert {p.name: p.read_bytes() for p in records.glob("*.json")} == before
    plan = run(folder, *COMMAND, "--dry-run").stdout
    assert plan.count(" done\n") == 5
