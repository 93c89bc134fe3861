"""A sweep that is finished is printed again without torch, exactly as it would be with it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_outcome import Outcome

from cmbench.cli import run_work
from cmbench.files import read_sealed
from cmbench.records.workspace import Workspace

Command = Callable[..., Outcome]
SWEEP = ("run", "-m", "toy", "-d", "toys", "--nfe", "1,3", "--quiet")
KEPT = "cache/plans/*.json"
OWN_RECIPE = """
[base]
batch_size = 32
duration_kimg = 0.032
network = { name = "mlp", width = 8 }

[toys.own]
"""


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every sweep that is planned from now on."""
    seen: list[Any] = []
    carry_out = run_work.carry_out

    def noted(options: Any, *more: Any) -> int:
        seen.append(options)
        return carry_out(options, *more)

    monkeypatch.setattr(run_work, "carry_out", noted)
    return seen


@pytest.fixture
def root() -> Path:
    return Workspace.choose().root


def test_a_plan_is_kept_with_the_code_that_made_it(cmbench_with_toys: Command, root: Path) -> None:
    """The plugins' files among it; neither Python's own nor those of installed packages."""
    cmbench_with_toys(*SWEEP)
    (kept,) = root.glob(KEPT)
    files = [Path(file) for file, _, _ in read_sealed(kept)["code"]]
    names = {path.name for path in files}
    assert {"toy.py", "toy.toml", "planning.py"} <= names
    library = Path(os.__file__).parent
    assert not any(path.is_relative_to(library) for path in files)
    assert not any("site-packages" in path.parts for path in files)


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--no-report",), ("--samples", "32")])
def test_it_says_the_same_without_planning(
    cmbench_with_toys: Command, planned: list[Any], root: Path, more: tuple[str, ...]
) -> None:
    first = cmbench_with_toys(*SWEEP, *(() if "--dry-run" in more else more))
    assert (first.code, len(planned)) == (0, 1), first.err
    again = cmbench_with_toys(*SWEEP, *more)
    assert len(planned) == 1
    for path in root.glob(KEPT):
        path.unlink()
    whole = cmbench_with_toys(*SWEEP, *more)
    assert len(planned) == 2
    assert (again.code, again.out, again.err) == (whole.code, whole.out, whole.err)
    assert "declined" in again.out if "--dry-run" in more else "skipped: 1 cell(s)" in again.err
    assert cmbench_with_toys(*SWEEP, *more).out == whole.out
    assert len(planned) == 2, "planned once, it is known again"


@pytest.mark.parametrize(
    "more",
    [
        ("--nfe", "1"),
        ("--seeds", "2"),
        ("-o", "sigma=3.0"),
        ("-r", "staged"),
        ("--ema", "raw"),
        ("--precision", "bf16"),
        ("--samples", "32"),
        ("--sigmas", "2.5"),
        ("--sampler", "other"),
        ("--save-samples",),
        ("--device", "cuda:99"),
        ("--split",),
    ],
)
def test_other_requests_are_planned(
    cmbench_with_toys: Command, planned: list[Any], more: tuple[str, ...]
) -> None:
    cmbench_with_toys(*SWEEP)
    cmbench_with_toys(*SWEEP, "--dry-run", *more)
    assert len(planned) == 2


def test_an_unknown_executor_is_refused_all_the_same(cmbench_with_toys: Command) -> None:
    cmbench_with_toys(*SWEEP)
    done = cmbench_with_toys(*SWEEP, "--executor", "nobody")
    assert (done.code, "unknown executor 'nobody'" in done.err) == (2, True), done.err


def test_what_is_not_there_any_more_is_made_again(
    cmbench_with_toys: Command, planned: list[Any], root: Path
) -> None:
    first = cmbench_with_toys(*SWEEP)
    (record,) = root.glob("records/toys/toy-*-nfe1-*.json")
    kept = record.read_bytes()
    record.unlink()
    assert cmbench_with_toys(*SWEEP, "--dry-run").out.count("to do") == 1
    assert cmbench_with_toys(*SWEEP).code == 0
    assert len(planned) == 3
    assert json.loads(record.read_bytes())["metrics"] == json.loads(kept)["metrics"]
    (result,) = root.glob("runs/toys/toy-*/result.json")
    result.unlink()
    assert "resume at" in cmbench_with_toys(*SWEEP, "--dry-run").out
    assert len(planned) == 4
    assert cmbench_with_toys(*SWEEP).code == first.code, "records are enough for the table"
    assert len(planned) == 4


@pytest.mark.parametrize("file", ["toy.toml", "toy.py"])
def test_changed_code_is_planned_again(
    cmbench_with_toys: Command, planned: list[Any], root: Path, file: str
) -> None:
    """Recipes and code alike, even if the time of its last change is put back."""
    cmbench_with_toys(*SWEEP)
    path = Path(__file__).parents[1] / file
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    cmbench_with_toys(*SWEEP)
    assert len(planned) == 2
    cmbench_with_toys(*SWEEP)
    assert (len(planned), len(list(root.glob(KEPT)))) == (2, 1)


def test_a_method_in_another_package_than_its_hooks_is_seen(
    cmbench_with_toys: Command,
    planned: list[Any],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    helper = tmp_path / "helper_of_a_plugin.py"
    helper.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("helper_of_a_plugin")
    cmbench_with_toys(*SWEEP)
    (path,) = root.glob(KEPT)
    assert str(helper) in {file for file, *_ in json.loads(path.read_text())["code"]}
    helper.write_text("CHANGED = True")
    cmbench_with_toys(*SWEEP)
    assert len(planned) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dataset": 1, "runs": [], "cells": [3]}'])
def test_a_damaged_plan_is_planned_again(
    cmbench_with_toys: Command, planned: list[Any], root: Path, text: str
) -> None:
    first = cmbench_with_toys(*SWEEP)
    (path,) = root.glob(KEPT)
    whole = path.read_text()
    path.write_text(text)
    assert cmbench_with_toys(*SWEEP).out == first.out
    assert len(planned) == 2
    assert path.read_text() == whole


def test_plans_that_depend_on_more_than_code_are_not_kept(
    cmbench_with_toys: Command, root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN_RECIPE)
    own = ("run", "-d", "toys", "--nfe", "1", "-r", f"{path}:own", "--no-report", "--quiet")
    assert cmbench_with_toys(*own, "-m", "edm").code == 0
    (folder,) = root.glob("runs/toys/edm-own-*")
    taught = cmbench_with_toys(*SWEEP, "-o", f"teacher=run:{folder}")
    assert taught.code == 0, taught.err
    assert cmbench_with_toys(*SWEEP, "-o", "trouble=raise").code == 1
    assert not list(root.glob(KEPT))


def test_it_imports_no_torch(cmbench: Command) -> None:
    sweep = ["run", "-m", "edm", "-d", "gmm", "-r", "smoke", "--nfe", "1", "--samples", "500"]
    assert cmbench(*sweep).code == 0
    code = (
        "import sys; from cmbench.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert not {'torch', 'sklearn', 'pandas'} & set(sys.modules)"
    )
    for more in ([], ["--dry-run"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *sweep, *more], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
