"""``cmbench run FILE.toml``: the file's values are defaults, and records name its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace

Command = Callable[..., Any]
EXAMPLE = Path(__file__).parents[2] / "examples" / "sweep.toml"
TOYS = """
method = "toy"
dataset = "toys"
nfe = [1]
seeds = [4]
no-report = true
sampler = ["toy", "other"]
[options]
optimizer.lr = [1e-3, 3e-3]
"optimizer.eps" = 1e-9
"""


def test_a_file_is_run_and_every_record_names_its_hash(
    cmbench_with_toys: Command, workspace: Workspace, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(TOYS)
    done = cmbench_with_toys("run", str(file), "-q")
    assert done.code == 0, done.err
    records = [read_record(path) for path in workspace.records("toys").glob("*.json")]
    assert sorted((r.training.config["optimizer"]["lr"], r.sampling.sampler) for r in records) == [
        (1e-3, "other"),
        (1e-3, "toy"),
        (3e-3, "other"),
        (3e-3, "toy"),
    ]
    assert {r.training.seed for r in records} == {4}
    assert {r.training.config["optimizer"]["eps"] for r in records} == {1e-9}
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert {r.run_file_sha256 for r in records} == {sha256}
    assert cmbench_with_toys("run", str(file), "-q").out == done.out


def test_the_command_line_overrides_the_file(
    cmbench_with_toys: Command, workspace: Workspace, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(TOYS)
    words = ("--sampler", "toy", "--seeds", "0,2", "-o", "optimizer.lr=0.01")
    done = cmbench_with_toys("run", str(file), "-q", *words)
    assert done.code == 0, done.err
    records = [read_record(path) for path in workspace.records("toys").glob("*.json")]
    found = sorted((r.training.seed, r.training.config["optimizer"]["lr"]) for r in records)
    assert found == [(0, 0.01), (2, 0.01)]
    assert {r.training.config["optimizer"]["eps"] for r in records} == {1e-9}


def test_records_of_sweeps_without_a_file_say_nothing_of_one(
    cmbench_with_toys: Command, workspace: Workspace
) -> None:
    assert cmbench_with_toys("run", "-m", "toy", "-d", "toys", "--no-report", "-q").code == 0
    for path in workspace.records("toys").glob("*.json"):
        assert "run_file_sha256" not in path.read_text()


def test_the_example_is_planned(cmbench: Command) -> None:
    done = cmbench("run", str(EXAMPLE), "--dry-run")
    assert done.code == 0, done.err
    assert done.out.count("digits/ict-smoke") == done.out.count("digits/sct-smoke") == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("methods = 'sct'", "unknown key 'methods'; … did you mean 'method'?"),
        ("batch_size = 3", "unknown key 'batch_size'; … did you mean 'batch-size'?"),
        ("option = 3", "unknown key 'option'; … did you mean 'options'?"),
        ("nfe = 0", "nfe: '0'; allowed: whole numbers from 1"),
        ("nfe = [1, 'x']", "nfe: '1,x'; allowed: whole numbers from 1"),
        ("nfe = []", "nfe: []; allowed: a text, a number, or a list of them"),
        ("nfe = [true]", "nfe: [True]; allowed: a text, a number"),
        ("method = ''", "method: ''; allowed: a text or a number"),
        ("dataset = ['digits']", "dataset: ['digits']; allowed: a text or a number"),
        ("samples = 'many'", "samples: 'many' is not a valid whole number"),
        ("dry-run = 1", "dry-run: 1; allowed: true, false"),
        ("labels = 'all'", "labels: 'all' is not one of 'drawn', 'quota'"),
        ("options = 3", "options is 3; allowed: a table [options]"),
        ("[options]\nx = 2020-01-01", "options.x: 2020-01-01; allowed: a text, number, list"),
        ("nfe = ", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_line(
    cmbench: Command, tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    done = cmbench("run", str(file))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: run file {file}"), done.err
    assert all(part in done.err for part in problem.split("…")), done.err
    assert done.err.count("\n") == 1
