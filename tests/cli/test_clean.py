"""``cmbench clean``: what would go, then goes; nothing that a record needs, nothing in use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_outcome import Outcome
from filelock import FileLock

from cmbench.records.workspace import Workspace

Command = Callable[..., Outcome]


@pytest.fixture
def used(cmbench_with_toys: Command, workspace: Workspace) -> Workspace:
    """A workspace with a sweep, and everything that can be left over."""
    done = cmbench_with_toys("run", "-m", "toy", "-d", "toys", "--nfe", "1", "--no-report", "-q")
    assert done.code == 0, done.err
    (run,) = (workspace.root / "runs" / "toys").iterdir()
    old, newest = sorted((run / "checkpoints").glob("*.json"))
    assert old.with_suffix(".safetensors").exists()
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (run / f".weights-final.safetensors.{gone}.tmp").write_bytes(b"x" * 2**20)
    (run / ".mine.1.tmp").write_text("process 1 is alive")
    (workspace.root / "runs" / "toys" / "toy-demo-s9-0123456789").mkdir()
    assert newest.exists()
    return workspace


def files(workspace: Workspace) -> set[str]:
    return {str(p.relative_to(workspace.root)) for p in workspace.root.rglob("*")}


def test_it_lists_first_and_deletes_when_told(cmbench: Command, used: Workspace) -> None:
    before = files(used)
    listed = cmbench("clean")
    assert (listed.code, listed.err) == (0, "")
    assert files(used) == before
    assert "superseded checkpoint" in listed.out
    assert "unfinished run that no record names" in listed.out
    assert "which is gone" in listed.out
    assert "4 item(s), 1.0 MiB; `cmbench clean --yes` deletes them" in listed.out
    done = cmbench("clean", "--yes")
    assert "deleted 4 item(s), 1.0 MiB" in done.out
    gone = before - files(used)
    assert len(gone) == 4
    assert not any("mine" in name or "result.json" in name for name in gone)
    assert "nothing to clean" in cmbench("clean").out


def test_the_sweep_is_still_finished_afterwards(
    cmbench: Command, cmbench_with_toys: Command, used: Workspace
) -> None:
    cmbench("clean", "--yes")
    (run,) = (used.root / "runs" / "toys").iterdir()
    (run / "weights-final.safetensors").unlink()
    again = cmbench_with_toys("run", "-m", "toy", "-d", "toys", "--nfe", "2", "--no-report", "-q")
    assert again.code == 0, again.err
    assert (run / "weights-final.safetensors").exists(), "from the checkpoint that was kept"


def test_runs_in_use_and_teachers_stay(cmbench: Command, used: Workspace) -> None:
    folder = used.root / "runs" / "toys" / "toy-demo-s9-0123456789"
    with FileLock(folder / ".lock"):
        found = json.loads(cmbench("clean", "--json").out)
    assert found["deleted"] is False
    assert str(folder) not in {item["path"] for item in found["leftovers"]}
    assert str(folder) in cmbench("clean").out


def test_a_record_that_cannot_be_read_stops_it(cmbench: Command, used: Workspace) -> None:
    (path,) = (used.root / "records" / "toys").glob("*.json")
    path.write_text("{")
    before = files(used)
    done = cmbench("clean", "--yes")
    assert done.code == 2
    assert "is not JSON" in done.err
    assert files(used) == before


def test_a_workspace_that_does_not_exist(cmbench: Command, tmp_path: Path) -> None:
    assert cmbench("clean", "-w", str(tmp_path / "none")).code == 4
