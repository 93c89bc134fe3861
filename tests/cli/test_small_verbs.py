"""``list``, ``plugins``, ``status``, ``show``, ``env``, ``completion`` and what ``--help`` says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench import __version__
from cmbench.cli.listing import KINDS
from cmbench.cli.main import COMMANDS
from cmbench.plugin.manager import PluginManager
from cmbench.records.workspace import Workspace

pytestmark = pytest.mark.usefixtures("any_width")

Command = Callable[..., Any]


@pytest.fixture
def swept(cmbench_with_toys: Command) -> Command:
    """A workspace with one finished, one declined and one failed cell."""
    toys = ("run", "-m", "toy", "-d", "toys", "--no-report", "-q")
    cmbench_with_toys(*toys, "--nfe", "1,3")
    cmbench_with_toys(*toys, "--nfe", "1", "-o", "trouble=nan-images")
    return cmbench_with_toys


def cell(workspace: Workspace, status: str) -> str:
    names = [
        p.stem
        for p in workspace.records("toys").glob("*.json")
        if json.loads(p.read_text())["status"] == status
    ]
    assert len(names) == 1
    return names[0]


# ---- help ---------------------------------------------------------------------------------------


def test_help_lists_every_verb_with_its_line_and_the_exit_codes(cmbench: Command) -> None:
    for flag in ("--help", "-h"):
        done = cmbench(flag)
        assert (done.code, done.err) == (0, "")
        for verb, (_, line) in COMMANDS.items():
            assert re.search(rf"^  {verb} +{re.escape(line)}$", done.out, re.MULTILINE), verb
        assert "Exit codes: 0 done; 1 some cells failed" in done.out


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help_and_its_options_a_description(cmbench: Command, verb: str) -> None:
    done = cmbench(verb, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: cmbench {verb} ")


def test_without_a_verb_help_is_shown(cmbench: Command) -> None:
    done = cmbench()
    assert done.code == 2
    assert "Usage: cmbench" in done.out + done.err


def test_version_names_the_plugins(cmbench_with_toys: Command) -> None:
    done = cmbench_with_toys("--version")
    assert done.code == 0
    assert done.out.splitlines() == [
        f"cmbench {__version__}",
        f"plugin cmbench-builtins from cmbench {__version__}",
        "plugin toys from toy-distribution 1.2.3",
    ]


# ---- list and plugins ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_listings_as_a_table_and_as_json(cmbench: Command, kind: str) -> None:
    plain, data = cmbench("list", kind), cmbench("list", kind, "--json")
    assert plain.code == data.code == 0
    assert plain.err == data.err == ""
    rows = json.loads(data.out)
    assert len(rows) == len(plain.out.splitlines()) - 1 > 0
    first = plain.out.splitlines()[0].split()
    assert first[0] == ("METHOD" if kind in ("recipes", "samplers") else "NAME")


def test_listed_methods_say_where_they_come_from(
    cmbench_with_toys: Command, plugins: PluginManager
) -> None:
    rows = {r["name"]: r for r in json.loads(cmbench_with_toys("list", "methods", "--json").out)}
    assert rows["toy"]["plugin"] == "toy-distribution"
    assert rows.keys() == plugins.methods.specs.keys() | {"toy", "broken-toy"}
    recipes = json.loads(cmbench_with_toys("list", "recipes", "--json").out)
    assert {"method": "toy", "dataset": "toys", "recipe": "staged"} in recipes


def test_listed_methods_say_what_they_cost(cmbench: Command) -> None:
    lines = cmbench("list", "methods").out.splitlines()
    header = lines[0]
    (line,) = [line for line in lines if line.startswith("diff-instruct")]
    found = {
        name: line[header.index(name) :].split("  ")[0]
        for name in ("TEACHER", "DATA", "GENERATED", "CALLS", "FORWARDS", "NFE")
    }
    assert found == {
        "TEACHER": "yes",
        "DATA": "labels",
        "GENERATED": "no",
        "CALLS": "3 + 2 graded",
        "FORWARDS": "9",
        "NFE": "1",
    }
    rows = {r["name"]: r for r in json.loads(cmbench("list", "methods", "--json").out)}
    assert rows["sid"]["calls"] == "1 + 2 graded + 2 graded to its input"
    assert rows["sid"]["forwards"] == 11
    assert "cost" not in rows["sid"]
    assert "GAN term" in rows["dmd2"]["notes"]


def test_a_listing_marks_the_default_method(cmbench: Command, plugins: PluginManager) -> None:
    marked = [line for line in cmbench("list", "methods").out.splitlines() if "(default)" in line]
    assert len(marked) == 1
    assert marked[0].split()[0] == plugins.default_method


def test_plugins_in_words_and_as_json(cmbench_with_toys: Command) -> None:
    lines = cmbench_with_toys("plugins").out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["cmbench-builtins", "cmbench", __version__, "ok"],
        ["toys", "toy-distribution", "1.2.3", "ok"],
    ]
    data = json.loads(cmbench_with_toys("plugins", "--json").out)
    assert data[1] == {
        "name": "toys",
        "module": "toy:PLUGIN",
        "distribution": "toy-distribution",
        "version": "1.2.3",
        "status": "ok",
        "error": "",
        "warning": "",
        "hooks": ["cmbench_register_datasets", "cmbench_register_methods"],
    }


# ---- status and show ----------------------------------------------------------------------------


def test_status_counts_and_names_trouble(swept: Command, workspace: Workspace) -> None:
    done = swept("status")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0] == f"workspace {workspace.root}"
    runs = [line for line in lines if line.startswith("run  toys/toy-demo-s0-")]
    assert len(runs) == 2
    assert all(line.endswith("trained, 320 images") for line in runs)
    assert any(
        re.fullmatch(r"failed  toy-demo-.*: method Toy, sample hook: 1 of 64 .*", x) for x in lines
    )
    assert any(x.endswith(": the toy takes one or two steps") for x in lines)
    assert lines[-1] == "records  toys  1 failed, 1 finished, 1 skipped"


@pytest.mark.parametrize(
    "verb",
    [
        ("status",),
        ("report",),
        ("export", "csv"),
        ("show", "x"),
        ("submit", "x"),
        ("verify", "x"),
        ("compare", "a", "b"),
    ],
)
def test_a_workspace_that_is_not_there_is_said_and_not_made(
    cmbench: Command, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    done = cmbench(*verb, "-w", str(tmp_path / "nothing"))
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith(
        f"error: --workspace: workspace {tmp_path / 'nothing'} does not exist;"
    )
    assert not (tmp_path / "nothing").exists()


def test_status_of_good_and_empty_workspaces_is_exit_0(
    cmbench_with_toys: Command, workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert cmbench_with_toys("status", "-w", str(tmp_path / "empty")).code == 0
    assert cmbench_with_toys("status").code == 0
    cmbench_with_toys("run", "-m", "toy", "-d", "toys", "--no-report", "-q", "--nfe", "1")
    assert cmbench_with_toys("status").code == 0


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("runs/toys/*/result.json", "{", "result.json: is not JSON (Expecting property name"),
        (
            "runs/toys/*/result.json",
            '{"images_seen": 1}',
            "result.json: has no hash of its contents",
        ),
        (
            "runs/toys/*/result.json",
            '{"images_seen": 1, "seal": "a"}',
            "result.json: was changed after it was written: its contents do not match their hash; "
            "delete it and run again\n",
        ),
        ("runs/toys/*/result.json", "[1]", "result.json: is not a JSON object; delete it"),
        ("runs/toys/*/run.json", "[]", "run.json: is not a JSON object; delete the folder of the"),
        ("records/toys/*.json", "{", "unreadable  record "),
    ],
)
def test_status_survives_corrupt_files(
    cmbench_with_toys: Command, workspace: Workspace, file: str, text: str, found: str
) -> None:
    cmbench_with_toys("run", "-m", "toy", "-d", "toys", "--no-report", "-q", "--nfe", "1")
    (path,) = workspace.root.glob(file)
    path.write_text(text)
    if path.name == "run.json":
        (path.parent / "result.json").unlink()
    done = cmbench_with_toys("status")
    assert found in done.out
    assert "unexpected" not in done.err
    assert done.code == (1 if "records" in file else 0)


def test_status_of_a_run_that_was_interrupted(swept: Command, workspace: Workspace) -> None:
    first, second = sorted((workspace.root / "runs" / "toys").iterdir())
    (first / "result.json").unlink()
    (first / "checkpoints" / "notes.json").write_text("{}")
    (second / "result.json").unlink()
    shutil.rmtree(second / "checkpoints")
    text = swept("status").out
    assert f"{first.name}  unfinished, checkpoint at 320 images" in text
    assert f"{second.name} +trouble=nan-images  not started" in text


def test_status_says_that_weights_are_gone(swept: Command, workspace: Workspace) -> None:
    first, second = sorted((workspace.root / "runs" / "toys").iterdir())
    assert "not here" not in swept("status").out
    (first / "weights-final.safetensors").unlink()
    text = swept("status").out
    assert f"{first.name}  trained, 320 images; the weights final are not here\n" in text
    assert f"{second.name} +trouble=nan-images  trained, 320 images\n" in text


def test_show_a_record_in_words_and_as_json(swept: Command, workspace: Workspace) -> None:
    name = cell(workspace, "finished")
    done = swept("show", name)
    assert done.code == 0
    assert f"cell         {name}\n" in done.out
    assert "method       toy (toy-distribution 1.2.3)\n" in done.out
    assert "sampling     NFE 1 (counted 1.0), toy at 2, 64 images, seed 0\n" in done.out
    assert re.search(r"^  fd-pixels +\d", done.out, re.MULTILINE)
    path = workspace.records("toys") / f"{name}.json"
    assert done.out.endswith(f"file         {path}\n")
    assert swept("show", name, "--json").out == path.read_text()
    assert swept("show", str(path)).out == done.out
    failed = swept("show", cell(workspace, "failed")).out
    assert "status       failed: method Toy, sample hook: 1 of 64 images have NaN" in failed


def test_show_takes_the_start_of_one_name(swept: Command, workspace: Workspace) -> None:
    name = cell(workspace, "skipped")
    assert f"cell         {name}\n" in swept("show", "toy-demo-s0-nfe3").out
    several = swept("show", "toy")
    assert several.code == 2
    assert several.err.startswith(
        "error: cmbench show: 'toy' matches 3 records; allowed: toy-demo-"
    )
    none = swept("show", "nothing")
    assert none.code == 2
    assert "no record 'nothing'" in none.err
    assert none.err.endswith("a file name in the folder records, without .json\n")


def test_show_without_records(cmbench: Command) -> None:
    done = cmbench("show", "x")
    assert (done.code, done.out) == (2, "")
    assert "no record 'x'; allowed: no records yet; " in done.err


def test_show_a_corrupt_record_is_one_line(swept: Command, workspace: Workspace) -> None:
    name = cell(workspace, "finished")
    path = workspace.records("toys") / f"{name}.json"
    path.write_text("{")
    done = swept("show", name)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: record {path}: is not JSON (")
    assert len(done.err.splitlines()) == 1


def test_a_record_cannot_move_the_cursor(swept: Command, workspace: Workspace) -> None:
    path = workspace.records("toys") / f"{cell(workspace, 'failed')}.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"reason": "\x1b[2J\x1b[31mred\r\nline"}))
    out = swept("show", path.stem).out
    assert "status       failed: ?[2J?[31mred??line\n" in out


# ---- env and completion -------------------------------------------------------------------------


def test_compare_names_what_it_could_not_read(swept: Command, workspace: Workspace) -> None:
    (workspace.records("toys") / "torn.json").write_text("{")
    done = swept("compare", "toy", "toy")
    assert "unreadable: record" in done.err
    assert "torn.json: is not JSON" in done.err
    for name in ("toyz", "/x", "*"):
        done = swept("compare", "toy", "toy", "-d", name)
        assert done.code == 2
        assert f"no records of {name!r}" in done.err
        assert "toys" in done.err


def test_env(cmbench: Command, workspace: Workspace) -> None:
    data = json.loads(cmbench("env", "--json").out)
    assert data["cmbench"] == __version__
    assert data["workspace"] == str(workspace.root)
    assert data["packages"]["torch"]
    assert data["threads"] == 1
    plain = cmbench("env")
    assert plain.code == 0
    assert [line.split()[0] for line in plain.out.splitlines()] == list(data)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cmbench: Command, shell: str) -> None:
    done = cmbench("completion", shell)
    assert done.code == 0
    assert "_CMBENCH_COMPLETE" in done.out
    if path := shutil.which(shell):
        checked = subprocess.run(
            [path, "-n"], input=done.out, text=True, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr


def test_an_unknown_shell_is_exit_2(cmbench: Command) -> None:
    assert cmbench("completion", "tcsh").code == 2


def test_titles_are_aligned_left(cmbench: Command) -> None:
    header, *lines = cmbench("study", "--list").out.splitlines()
    start = header.index("title")
    assert len(lines) > 1
    assert all(line[start - 1] == " " != line[start] for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tolerance", "0.1"), "--tolerance: compares images that are sampled again"),
        (("--full", "--no-resample"), "--full: compares images that are sampled again"),
        (("--full", "--tolerance", "nan"), "'--tolerance': nan is not a finite number"),
        (("--full", "--tolerance", "inf"), "'--tolerance': inf is not in the range"),
        (("--full", "--tolerance", "2"), "'--tolerance': 2.0 is not in the range"),
    ],
)
def test_options_of_verify_that_would_do_nothing_are_refused(
    cmbench: Command, options: tuple[str, ...], message: str
) -> None:
    done = cmbench("verify", "x", *options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_parity_names_itself(cmbench: Command, tmp_path: Path) -> None:
    done = cmbench("parity", str(tmp_path / "no.pkl"), "--inputs", str(tmp_path / "in"))
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith(f"error: cmbench parity: {tmp_path / 'no.pkl'} does not exist; ")


@pytest.mark.parametrize(
    "verb",
    [
        ("merge", "NOPE"),
        ("refs", "import", "NOPE.npz"),
        ("verify", "NOPE.zip"),
        ("submit", "NOPE.json"),
        ("show", "NOPE.json"),
        ("eval", "NOPE", "-d", "digits"),
        ("prepare", "cifar10", "--source", "NOPE"),
        ("parity", "NOPE", "--inputs", "x"),
        ("import", "NOPE"),
    ],
)
def test_a_path_that_is_not_there_is_exit_4(
    cmbench: Command, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    missing = str(tmp_path / "nope")
    done = cmbench(*(word.replace("NOPE", missing) for word in verb))
    assert (done.code, done.out) == (4, ""), done.err
    assert missing in done.err


@pytest.mark.parametrize(
    ("words", "who"),
    [
        (("eval", "", "-d", "digits"), "cmbench"),
        (("merge", ""), "cmbench"),
        (("show", ""), "cmbench"),
        (("run", "--recipe", ""), "--recipe"),
        (("run", "-w", ""), "-w"),
        (("run", "--recipe="), "--recipe"),
        (("eval", "x", "--label", ""), "--label"),
    ],
)
def test_empty_values_are_refused(cmbench: Command, words: tuple[str, ...], who: str) -> None:
    done = cmbench(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {who}: an empty value; give a value, or leave it out\n"
