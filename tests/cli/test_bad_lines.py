"""Two hundred wrong command lines: each costs one line that says what is wrong and what to do."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_outcome import Outcome

TABLE = Path(__file__).with_name("bad_lines.tsv").read_text()
LINES = list(csv.DictReader(TABLE.splitlines(), dialect="excel-tab", quoting=csv.QUOTE_NONE))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("run --method nope\n")


def test_there_are_two_hundred() -> None:
    assert len({line["arguments"] for line in LINES}) == len(LINES) >= 200


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["arguments"])
def test_a_wrong_command_line_is_one_line(
    cmbench: Callable[..., Outcome], line: dict[str, str]
) -> None:
    done = cmbench(*shlex.split(line["arguments"]))
    assert (done.code, done.out) == (int(line["code"]), "")
    assert done.err.startswith(f"error: {line['error begins with']}"), done.err
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err


def test_what_needs_no_tensor_is_said_without_torch(tmp_path: Path) -> None:
    """All of them in one process, which would notice torch."""
    lines = [line["arguments"] for line in LINES if line["needs"] == "-"]
    assert len(lines) > 150
    script = (
        "import shlex, sys\n"
        "from cmbench.cli.main import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    try:\n"
        "        main(shlex.split(line))\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'imports torch: {line}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
