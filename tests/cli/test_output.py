"""What reaches the terminal: no commands of strangers, any encoding, a disk that is full."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_outcome import Outcome
from PIL import Image

from cmbench.cli.output import printable

Command = Callable[..., Outcome]
EVAL = ("eval", "-d", "digits", "--metrics", "fd-digits", "-q")


def finished(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a fresh cmbench in an environment that says nothing of languages."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", "cmbench", *arguments],
        capture_output=True,
        env=known | environment,
        check=False,
    )


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(16):
        Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    return folder


# ---- control characters --------------------------------------------------------------------------


def test_what_is_printable() -> None:
    assert printable("a\x1b[2J\x07\r\x9b\u202eb\ud800\ufeff") == "a?[2J????b??"
    kept = "lines\nand\ttabs, é → … × \u00a0 中 🎉"
    assert printable(kept) == kept


def test_no_name_commands_the_terminal(cmbench: Command, tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07"
    folder = tmp_path / "workspace"
    (folder / "records" / f"d{evil}").mkdir(parents=True)
    (folder / "records" / f"d{evil}" / f"r{evil}.json").write_text("{")
    (folder / "runs" / "digits" / f"run{evil}").mkdir(parents=True)
    (folder / "imported").mkdir()
    (folder / "imported" / f"m{evil}.json").write_text(json.dumps({"meta": evil}))
    work = ("-w", str(folder))
    for arguments in (
        ("status", *work),
        ("compare", evil, evil, *work),
        ("compare", "a", "b", "-d", evil, *work),
        ("show", evil, *work),
        ("show", str(folder / "records" / f"d{evil}" / f"r{evil}.json"), *work),
        ("report", *work),
        ("run", "-m", evil),
        ("run", f"--{evil}"),
        (evil,),
        ("import", evil),
        ("list", evil),
        ("eval", evil, "-d", evil),
        ("verify", evil),
    ):
        done = cmbench(*arguments)
        assert "owned" in done.out + done.err or arguments[0] in ("report", "compare"), arguments
        assert not set(done.out + done.err) & {"\x1b", "\x07"}, arguments


# ---- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "N → ∞"),  # click then writes UTF-8
        ({"PYTHONIOENCODING": "latin-1"}, "N -> inf"),
        ({"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "N → ∞"),
    ],
)
def test_a_terminal_without_our_characters(
    digits: Path, tmp_path: Path, environment: dict[str, str], shown: str
) -> None:
    workspace = tmp_path / "workspace"
    done = finished(*EVAL, str(digits), "-w", str(workspace), **environment)
    assert done.returncode == 0, done.stderr
    assert shown.encode() in done.stdout
    assert len(list((workspace / "records" / "digits").glob("*.json"))) == 1


# ---- files that cannot be written ----------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_loses_no_record(digits: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cmbench", *EVAL, str(digits), "-w", str(workspace)],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    errors = [x for x in done.stderr.decode().splitlines() if not x.startswith("warning")]
    assert done.returncode == 2
    assert errors == [
        "error: stdout: cannot be written: No space left on device; results that were computed are"
        " in the workspace: see `cmbench status`"
    ]
    assert len(list((workspace / "records" / "digits").glob("*.json"))) == 1


# ---- surroundings --------------------------------------------------------------------------------


_HOMELESS = """
import os, pwd, sys
def none(user): raise KeyError(user)
pwd.getpwuid = none
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "CMBENCH_DATA"):
    os.environ.pop(name, None)
from cmbench.cli.main import main
for words in eval(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stopped:
        print("exit", stopped.code, *words, flush=True)
"""


def test_a_user_without_a_name_or_a_home(digits: Path, tmp_path: Path) -> None:
    commands = [
        ("env",),
        ("list", "datasets"),
        ("prepare",),
        ("prepare", "folder:~/x"),
        ("prepare", "cifar10", "--verify"),
        (*EVAL, str(digits)),
        ("run", "-m", "ct", "-d", "gmm", "--dry-run", "-q"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", _HOMELESS, repr(commands)],
        capture_output=True,
        cwd=tmp_path,
        check=False,
        text=True,
    )
    assert "unexpected" not in done.stderr
    codes = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert codes == ["0", "0", "0", "4", "4", "0", "0"], done.stderr
    assert str(tmp_path / "cmbench-data") in done.stdout


def test_a_workspace_that_records_cannot_name(cmbench: Command, tmp_path: Path) -> None:
    workspace = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    done = cmbench("run", "-m", "ct", "-d", "gmm", "-w", workspace)
    assert done.code == 2
    assert done.err.startswith("error: --workspace: ")
    assert "\\\\xff' is not UTF-8; allowed: a path in UTF-8" in done.err


def test_links_to_nothing_and_no_path(cmbench: Command, digits: Path) -> None:
    (digits / "x.png").symlink_to("gone.png")
    for arguments in ((*EVAL, str(digits)), ("prepare", f"folder:{digits}", "--name", "mine")):
        done = cmbench(*arguments)
        assert done.code == 2
        message = "image 'x.png' cannot be read: No such file or directory (broken link)"
        assert message in done.err.splitlines()[-1]
    done = cmbench("prepare", "folder:")
    assert (done.code, done.err) == (
        2,
        "error: dataset 'folder:': names no path; allowed: folder:PATH; for example"
        " folder:./images\n",
    )


def test_a_name_that_no_file_can_have(cmbench: Command, tmp_path: Path) -> None:
    done = cmbench("refs", "import", str(tmp_path / ("x" * 300 + ".npz")))
    assert done.code in (2, 4)
    assert "unexpected" not in done.err


def test_pictures_for_data_of_two_channels(cmbench: Command, digits: Path) -> None:
    done = cmbench("eval", str(digits), "-d", "gmm", "-q")
    assert done.code == 2
    assert "cannot have 2 channels; allowed: 1 or 3" in done.err
    assert "unexpected" not in done.err


def test_nothing_prints_past_the_one_place() -> None:
    package = Path(__file__).parents[2] / "cmbench"
    found = [
        str(path)
        for path in package.rglob("*.py")
        if path.name != "output.py" and re.search(r"\bclick\.echo\(|^\s*print\(", path.read_text())
    ]
    assert found == []
