"""A small part of the fuzz campaign, and that it sees what it looks for."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fuzz_mutations import PIPE, damage

TOOL = Path(__file__).with_name("fuzz.py")


@pytest.mark.slow
def test_a_part_of_the_campaign(tmp_path: Path) -> None:
    """Every kind of file, damaged a few times: no offence."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), "--inputs", "310", "--seed", "2", "--keep",
         str(tmp_path / "kept")],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("310 inputs, exit codes")
    assert done.stdout.splitlines()[-1].endswith(", 0 offences")


def test_damage_depends_on_the_seed_alone() -> None:
    files = {"a.json": json.dumps({"x": [1, 2], "y": "z"}).encode(), "b.bin": bytes(100)}
    made = [damage(files, random.Random(i)) for i in range(40)]
    assert made == [damage(files, random.Random(i)) for i in range(40)]
    assert all(changed != files for changed in made)
    assert len({tuple(sorted(changed.items())) for changed in made}) > 30


def test_a_named_pipe_in_the_place_of_a_file(tmp_path: Path, monkeypatch: Any) -> None:
    import fuzz
    from fuzz_seeds import Seed

    files = {"a.json": b"{}"}
    made = [damage(files, random.Random(i)) for i in range(500)]
    piped = [changed for changed in made if changed["a.json"] == PIPE]
    assert 1 <= len(piped) <= 50
    monkeypatch.setattr(fuzz, "main", lambda arguments: print(Path(arguments[0]).is_fifo()))
    assert fuzz.read(Seed("mine", files, ("{in}/a.json",)), piped[0], tmp_path) == (0, "True\n")


# ---- what it sees --------------------------------------------------------------------------------


@pytest.fixture
def outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that runs a reader of our own on one input and returns its outcome."""
    import fuzz
    from fuzz_seeds import Seed

    for name in ("here", "home", "tmp"):
        (tmp_path / name).mkdir()
    limits = SimpleNamespace(seed=1, seconds=1.0, memory=64)

    def run(reader: Any) -> Any:
        monkeypatch.setattr(fuzz, "main", lambda arguments: reader())
        (outcome,) = fuzz.campaign([(7, Seed("mine", {"a": b"abc"}, ("x",)))], tmp_path, limits)
        assert (outcome.index, outcome.name) == (7, "mine")
        return outcome

    return run


def exits() -> None:
    print("error: a clear line", file=sys.stderr)
    sys.exit(2)


def test_a_clear_line_is_no_offence(outcomes: Any) -> None:
    outcome = outcomes(exits)
    assert (outcome.code, outcome.offences) == (2, [])


def burn() -> None:
    end = time.process_time() + 1.2
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("reader", "offence"),
    [
        (lambda: 1 / 0, "unhandled: Traceback"),
        (lambda: print("error: unexpected KeyError: 2"), "unhandled: error: unexpected KeyError"),
        (lambda: print("\x1b[2J"), "control characters were printed"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "signal 7"),
        (lambda: time.sleep(60), "time: it never ended"),
        (burn, "time: 1."),
        (lambda: bytearray(os.urandom(1)) * (200 << 20), "memory: "),
        (lambda: Path("/tmp/cmbench-fuzz-outside").write_text("x"), "wrote /tmp/cmbench-fuzz-out"),
        (lambda: subprocess.run(["true"], check=False), "started a program"),
    ],
)
def test_each_offence_is_seen(outcomes: Any, reader: Any, offence: str) -> None:
    try:
        found = outcomes(reader).offences
    finally:
        Path("/tmp/cmbench-fuzz-outside").unlink(missing_ok=True)
    assert any(text.startswith(offence) for text in found), found
