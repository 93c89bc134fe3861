"""Threads, workspace, provenance: what surrounds a run and goes into its record."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from cmbench.errors import UserError, one_line
from cmbench.records import provenance
from cmbench.records.workspace import Workspace
from cmbench.sweep import threads
from cmbench.sweep.failures import compiler_failure, method_failure

# ---- threads ------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight cores, none of them busy."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return monkeypatch


@pytest.mark.parametrize(
    ("load", "expected"), [(0.0, 8), (0.7, 8), (0.8, 7), (3.0, 5), (7.9, 1), (50.0, 1)]
)
def test_free_cores_are_used(machine: pytest.MonkeyPatch, load: float, expected: int) -> None:
    machine.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert threads.choose_threads() == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("3", 3), ("64", 64), ("0", 8), ("", 8), ("-1", 8), ("many", 8)]
)
def test_the_variable_wins(machine: pytest.MonkeyPatch, given: str, expected: int) -> None:
    machine.setenv("OMP_NUM_THREADS", given)
    assert threads.choose_threads() == expected


@pytest.mark.parametrize(
    ("before", "now", "same", "expected"),
    [
        (3, 8, True, 3),
        (8, 1, True, 8),  # the same bits, however busy the machine is now
        (3, 8, False, 8),
        (8, 1, False, 1),  # one process of eight had an eighth of the cores
        (16, 8, True, 8),
        (64, 64, True, 64),  # 64 only if they are asked for again
    ],
)
def test_threads_of_a_resumed_run(
    machine: pytest.MonkeyPatch, before: int, now: int, same: bool, expected: int
) -> None:
    assert threads.resumed_threads(before, now, same_processes=same) == expected


def test_a_system_without_a_load_has_all_cores(machine: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[float, float, float]:
        raise OSError

    machine.setattr(os, "getloadavg", missing)
    assert threads.choose_threads() == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 8), (None, 8)],
)
def test_quotas_of_a_container_count(
    monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    def read_text(path: Path, encoding: str) -> str:
        if quota is None:
            raise FileNotFoundError
        return quota

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert threads.available_cores() == expected


def test_torch_is_told() -> None:
    try:
        threads.use_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        threads.use_threads(1)
    assert torch.get_num_threads() == 1


# ---- workspace ----------------------------------------------------------------------------------


def test_the_workspace_is_the_option_or_the_variable_or_a_folder_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CMBENCH_WORKSPACE", "from-variable")
    assert Workspace.choose("given").root == Path("given")
    assert Workspace.choose().root == Path("from-variable")
    monkeypatch.delenv("CMBENCH_WORKSPACE")
    assert Workspace.choose().root == Path("cmbench-out")


def test_all_paths_lie_below_the_root(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    for path in (
        place.reports,
        place.cache,
        place.records("d"),
        place.run("d/r"),
        place.samples("c"),
    ):
        assert path.is_relative_to(tmp_path)
    place.require_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_workspace_that_cannot_be_written_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as raised:
        Workspace(tmp_path / below).require_writable()
    text = str(raised.value)
    assert text.startswith(f"workspace {tmp_path / below}: cannot be written (")
    assert text.endswith("choose another with --workspace or CMBENCH_WORKSPACE")


def test_a_full_disk_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        Workspace(tmp_path).require_writable()


# ---- provenance ---------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "provenance.py").write_text("x")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_checkout_gives_commit_and_dirty_flag(checkout: Path) -> None:
    provenance.git_state.cache_clear()
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.git_state(checkout / "package") == (commit, False)
    (checkout / "package" / "provenance.py").write_text("y")
    provenance.git_state.cache_clear()
    assert provenance.git_state(checkout / "package") == (commit, True)


def test_an_installed_copy_inside_a_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "provenance.py").write_text("x")
    provenance.git_state.cache_clear()
    assert provenance.git_state(installed) == (None, None)


def test_no_checkout_or_no_git_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provenance.git_state.cache_clear()
    assert provenance.git_state(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", "")
    provenance.git_state.cache_clear()
    assert provenance.git_state(Path(provenance.__file__).parent) == (None, None)
    provenance.git_state.cache_clear()


def test_the_environment_names_what_can_move_a_number() -> None:
    found = provenance.environment(3, "a GPU", world=2)
    assert torch.__version__.startswith(found.packages["torch"].partition("+")[0])
    assert {"torch", "numpy", "scipy", "torch-fidelity", "clean-fid"} <= found.packages.keys()
    assert (found.threads, found.gpu, found.world_size) == (3, "a GPU", 2)
    assert found.cpu
    assert str(Path.home()) not in found.model_dump_json()


# ---- failures -----------------------------------------------------------------------------------


def test_a_failure_is_one_short_line() -> None:
    line = method_failure("m", "training", ValueError("two\n lines " + "x" * 1000))
    assert line.startswith("method 'm' failed while training: ValueError: two lines xxx")
    assert len(line) < 600
    assert one_line("short\ttext\n") == "short text"


def test_a_compiler_that_fails_is_not_the_methods_fault() -> None:
    what = (
        "InductorError: InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')\n\n"
        "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"
    )
    assert compiler_failure("m", "training", what) == (
        "torch.compile failed while training 'm' (InductorError: InvalidCxxCompiler: No working "
        "C++ compiler found in (None, 'g++')); add --no-compile, which changes speed and "
        "rounding only, or install what it lacks, usually a C++ compiler"
    )
    assert compiler_failure("m", "training", "RuntimeError: InductorError") is None
