"""`leaderboard`, `compare`, `merge`, `verify`, `submit`, `export`, in process."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from record_factory import metric, on_disk, record, sweep

from cmbench.cli.compare import compare_
from cmbench.cli.export import export
from cmbench.cli.leaderboard import leaderboard
from cmbench.cli.merge import merge_
from cmbench.cli.show import describe
from cmbench.cli.submit import submit
from cmbench.cli.verify import verify
from cmbench.errors import UserError
from cmbench.records.record import read_record

BOARDS = Path(__file__).parents[2] / "leaderboards"


def run(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False)


def message(result: Result) -> str:
    assert isinstance(result.exception, UserError)
    return str(result.exception)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    on_disk(tmp_path / "ws/records/digits", sweep(("alpha", "beta"), (1, 2), 4))
    return tmp_path / "ws"


# ---- leaderboard --------------------------------------------------------------------------------


def test_validate_counts_rows_and_names_problems(tmp_path: Path) -> None:
    result = run(leaderboard, "validate", BOARDS)
    assert result.return_value == 0
    assert "cifar10: 118 rows in 6 tables" in result.stdout
    folder = Path(shutil.copytree(BOARDS, tmp_path / "boards"))
    path = folder / "lsun-cat256" / "published.csv"
    path.write_text(path.read_text().replace("37.5", "37,5").replace(",2018,GAN", ",18,GAN"))
    result = run(leaderboard, "validate", folder)
    assert result.return_value == 2
    assert "published.csv line 5" in result.stderr
    assert "lsun-cat256" not in result.stdout


def test_render_makes_the_pages_of_boards_and_their_records(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BOARDS, tmp_path / "boards"))
    on_disk(folder / "digits/records", sweep(("alpha",), (1,), 2))
    (folder / "digits/board.toml").write_text(
        'schema_version = 1\ndataset = "digits"\ntitle = "Digits, 8×8"\n'
        'rank_metric = "fd-digits"\nnotes = ["alpha is behind because of <b>."]\n'
    )
    result = run(leaderboard, "render", folder, "--out", tmp_path / "out")
    assert result.return_value == 0, result.exception
    names = {Path(line).name for line in result.stdout.splitlines()}
    assert {"cifar10.html", "imagenet512.tex", "digits.html", "index.html"} <= names
    assert "imagenet64-adm.html" not in names
    html = (tmp_path / "out/digits.html").read_text()
    assert "<h1>Digits, 8×8</h1>" in html
    assert "alpha is behind because of &lt;b&gt;." in html
    assert "63×2" in (tmp_path / "out/imagenet512.md").read_text()


def test_list_and_show(tmp_path: Path) -> None:
    assert "imagenet512" in run(leaderboard, "list", BOARDS).stdout
    result = run(leaderboard, "show", "cifar10", BOARDS, "--nfe", "10")
    assert "13.36" in result.stdout
    assert "8.23" in result.stdout
    assert "StyleGAN" not in result.stdout
    assert "did you mean 'cifar10'" in message(run(leaderboard, "show", "cifar", BOARDS))


def test_leaderboard_needs_a_folder_with_boards(tmp_path: Path) -> None:
    assert "is not a folder" in message(run(leaderboard, "validate", tmp_path / "no"))
    assert "has no board" in message(run(leaderboard, "validate", tmp_path))


# ---- compare ------------------------------------------------------------------------------------


def test_compare_prints_verdicts_and_its_exit_code_says_who_is_worse(workspace: Path) -> None:
    result = run(compare_, "alpha", "beta", "-w", workspace)
    assert result.return_value == 0
    assert "A is better" in result.stdout
    assert "digits, fd-digits" in result.stdout.splitlines()
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert run(compare_, "beta", "alpha", "-w", workspace).return_value == 1
    assert "no measured rows match 'zeta'" in message(
        run(compare_, "zeta", "beta", "-w", workspace)
    )


def test_compare_without_anything_comparable_exits_4(tmp_path: Path) -> None:
    other = {"fd-digits": metric(1.0, key="other")}
    on_disk(tmp_path / "records/digits", [record("alpha"), record("beta", metrics=other)])
    result = run(compare_, "alpha", "beta", "-w", tmp_path)
    assert result.return_value == 4
    assert "metric keys differ" in result.stderr


# ---- merge, submit, verify ----------------------------------------------------------------------


def test_merge_brings_workspaces_together(workspace: Path, tmp_path: Path) -> None:
    result = run(merge_, workspace, "-w", tmp_path / "all")
    assert result.return_value == 0
    assert "added  digits/digits-alpha-demo-nfe1-s0" in result.stdout
    assert "16 added, 0 replaced, 0 already there" in result.stderr
    assert "16 already there" in run(merge_, workspace, "-w", tmp_path / "all").stderr


def test_submit_and_verify_without_sampling(workspace: Path, tmp_path: Path) -> None:
    archive = tmp_path / "out.zip"
    cell = "digits-alpha-demo-nfe1-s0"
    assert run(submit, cell, "-w", workspace, "--out", archive).return_value == 0
    result = run(verify, archive, "-w", workspace, "--no-resample")
    # The synthetic recipe hash is no hash of its recipe; everything else is in order.
    failed = [line.split()[1] for line in result.stdout.splitlines() if " failed " in f"{line} "]
    assert failed == ["recipe"]
    assert result.return_value == 1
    assert "not checked  samples: skipped (--no-resample)" in result.stdout
    assert "no record 'zeta'" in message(run(submit, "zeta", "-w", workspace))


@pytest.mark.slow
def test_verify_samples_a_real_cell_again(tmp_path: Path) -> None:
    place = tmp_path / "ws"
    command = [
        sys.executable,
        "-c",
        "from cmbench.cli.main import main; main()",
        "run",
        "-q",
        "-m",
        "edm",
        "-r",
        "smoke",
        "--nfe",
        "2",
        "--samples",
        "300",
        "--threads",
        "1",
        "--no-report",
        "-o",
        "duration_kimg=0.5",
        "-w",
        str(place),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = next(place.glob("records/digits/*.json"))
    result = run(verify, path, "-w", place)
    assert result.return_value == 0, result.stdout
    for part in ("recipe hash", "checkpoint", "artifact grid", "samples"):
        assert f"ok           {part}: " in result.stdout

    item = read_record(path)
    metrics = dict(item.metrics)
    better = item.metrics["fd-digits"].value
    assert better is not None
    metrics["fd-digits"] = metrics["fd-digits"].model_copy(update={"value": better * 0.9})
    path.write_text(item.model_copy(update={"metrics": metrics}).to_json())
    result = run(verify, path, "-w", place, "--full")
    assert result.return_value == 1
    assert "failed       metric fd-digits: " in result.stdout

    path.write_text(item.to_json())
    shutil.rmtree(place / "runs")
    result = run(verify, path, "-w", place)
    assert "is not in" in result.stdout
    assert result.return_value == 0


# ---- export -------------------------------------------------------------------------------------


def test_export_csv_and_json_rows(workspace: Path) -> None:
    result = run(export, "csv", "-w", workspace)
    lines = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(line["method"], line["nfe"], line["may_be_best"]) for line in lines] == [
        ("alpha", "1", "True"),
        ("beta", "1", "False"),
        ("alpha", "2", "True"),
        ("beta", "2", "False"),
    ]
    assert len(lines[0]["fd-digits_values"].split()) == 4
    rows = json.loads(run(export, "json", "-w", workspace).stdout)
    assert rows[0]["fd-digits_mean"] == float(lines[0]["fd-digits_mean"])


def test_export_cells_as_csv_and_parquet(workspace: Path, tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(run(export, "csv", "--cells", "-w", workspace).stdout)))
    assert len(lines) == 16
    assert json.loads(lines[0]["training.config"])["lr"] == 1e-3
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    pandas = pytest.importorskip("pandas")
    out = tmp_path / "cells.parquet"
    assert run(export, "parquet", "--cells", "-w", workspace, "--out", out).return_value == 0
    frame = pandas.read_parquet(out)
    assert len(frame) == 16
    assert frame["metrics.fd-digits.value"].dtype == float
    assert run(export, "parquet", "-w", workspace, "--out", out).return_value == 0
    assert len(pandas.read_parquet(out)) == 4


def test_export_latex(workspace: Path) -> None:
    result = run(export, "latex", "-w", workspace)
    best = [line for line in result.stdout.splitlines() if line.startswith("alpha")]
    distances = [line.split(" & ")[2] for line in best]
    assert len(best) == 2
    assert all(cell.startswith(r"\textbf{") for cell in distances)
    assert r"\begin{tabular}" in result.stdout


def test_export_says_what_it_cannot_do(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "parquet needs a file" in message(run(export, "parquet", "-w", workspace))
    assert "latex has rows only" in message(run(export, "latex", "--cells", "-w", workspace))
    assert "no records of 'x'" in message(run(export, "csv", "-d", "x", "-w", workspace))
    (workspace / "records/digits/torn.json").write_text("{")
    result = run(export, "csv", "-w", workspace)
    assert result.return_value == 1
    assert "torn.json: is not JSON" in result.stderr
    monkeypatch.setattr("cmbench.leaderboard.export.find_spec", lambda name: None)
    out = workspace / "x.parquet"
    text = message(run(export, "parquet", "-w", workspace, "--out", out))
    assert "needs pyarrow" in text
    assert "pip install 'cmbench[parquet]'" in text


def test_merge_goes_on_past_what_it_cannot_read(workspace: Path, tmp_path: Path) -> None:
    (workspace / "records/digits/torn.json").write_text("{")
    result = run(merge_, workspace, "-w", tmp_path / "all")
    assert result.return_value == 1
    assert "16 added, 0 replaced, 0 already there" in result.stderr
    assert "unreadable: record " in result.stderr


@pytest.mark.parametrize(("command", "who"), [(verify, "verify"), (submit, "submit")])
def test_an_unknown_cell_names_the_verb(workspace: Path, command: click.Command, who: str) -> None:
    said = message(run(command, "nope", "-w", workspace))
    assert said.startswith(f"cmbench {who}: no record 'nope'; allowed: ")
    assert said.partition("allowed: ")[2].split("; ")[0].endswith(", …")


def test_a_damaged_archive_is_called_that(workspace: Path, tmp_path: Path) -> None:
    path = next((workspace / "records" / "digits").glob("*.json"))
    archive = tmp_path / "out.zip"
    assert run(submit, path, "--out", archive, "-w", workspace).return_value == 0
    whole = archive.read_bytes()
    for name in ("cut.zip", "cut"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        said = message(run(verify, tmp_path / name, "-w", workspace))
        assert "is not a readable zip: damaged or truncated" in said


def test_show_rounds_and_keeps_lines_short() -> None:
    found = record(
        metrics={
            "recall": metric(0.123456789012345, interval=(1.7347234759768e-18, 0.25)),
            "is": metric(None),
        }
    )
    packages = {f"package-{i}": "1.2.3" for i in range(30)}
    environment = found.environment.model_copy(update={"packages": packages})
    lines = describe(found.model_copy(update={"environment": environment}))
    assert any(line.startswith("  recall         0.123457  95 % [0 0.25]") for line in lines)
    assert any(line.startswith("  is             -  ") for line in lines)
    assert all(len(line) <= 100 for line in lines if "package-" in line)
    assert sum(line.count("package-") for line in lines) == 30
