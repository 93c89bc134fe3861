"""The mutation campaign: what it changes, what it runs, and that it goes on where it was."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from coverage_map import Selection, body_lines, moved_entry, moved_lines
from mutate import EQUIVALENT
from mutations import Mutation, mutations, sample

TOOL = Path(__file__).with_name("mutate.py")
SOURCE = b'''"""A docstring with 1 number."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 3


def clamp(x: int, low: int = 0, *, high: float = 2.5) -> float:
    """Return x within 1."""
    assert low < high
    if x < low and not (x is None):
        raise ValueError(f"{x} is below {low + 1}")
    for value in (v for v in (low, x) if v):
        if value:
            continue
        return -value
    with open("x"):
        x += 1
    return max(
        min(x, low), high or 0, key=abs,
    ) - 7 // 2
'''


def found(source: bytes = SOURCE) -> list[Mutation]:
    return mutations("package/module.py", source)


def changes(kind: str, source: bytes = SOURCE) -> set[tuple[str, str]]:
    return {(m.before, m.after) for m in found(source) if m.site.kind == kind}


def test_every_mutation_compiles_to_other_code_and_has_its_own_name() -> None:
    clean = ast.dump(ast.parse(SOURCE))
    assert all(ast.dump(ast.parse(m.applied(SOURCE))) != clean for m in found())
    assert len({m.key for m in found()}) == len(found())
    assert len({m.applied(SOURCE) for m in found()}) == len(found())


def test_docstrings_annotations_asserts_and_messages_are_left_alone() -> None:
    lines = {m.site.first_line for m in found()}
    untouched = [1, 2, 4, 5, 9, 10]
    assert lines.isdisjoint(untouched)
    assert not any("below" in m.after for m in found() if m.site.kind != "statement")


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("comparison", "if x < low and not (x is None):", "if x <= low and not (x is None):"),
        ("comparison", "if x < low and not (x is None):", "if x >= low and not (x is None):"),
        ("comparison", "if x < low and not (x is None):", "if x < low and not (x is not None):"),
        ("boolean", "if x < low and not (x is None):", "if x < low or not (x is None):"),
        ("operand", "if x < low and not (x is None):", "if True and not (x is None):"),
        ("operand", "min(x, low), high or 0, key=abs,", "min(x, low), False or 0, key=abs,"),
        ("not", "if x < low and not (x is None):", "if x < low and (x is None):"),
        ("condition", "if x < low and not (x is None):", "if True:"),
        ("condition", "if value:", "if False:"),
        (
            "condition",
            "for value in (v for v in (low, x) if v):",
            "for value in (v for v in (low, x) if True):",
        ),
        ("constant", ") - 7 // 2", ") - 8 // 2"),
        (
            "constant",
            "def clamp(x: int, low: int = 0, *, high: float = 2.5) -> float:",
            "def clamp(x: int, low: int = 0, *, high: float = 5.0) -> float:",
        ),
        ("arguments", "min(x, low), high or 0, key=abs,", "high or 0, min(x, low), key=abs,"),
        ("keyword", "min(x, low), high or 0, key=abs,", "min(x, low), high or 0, "),
        ("twin", "return max(", "return min("),
        ("arithmetic", ") - 7 // 2", ") + 7 // 2"),
        ("arithmetic", ") - 7 // 2", ") - 7 * 2"),
        ("arithmetic", "x += 1", "x -= 1"),
        ("arithmetic", "return -value", "return value"),
        ("statement", "continue", "pass"),
        ("statement", "return -value", "pass"),
        ("statement", "x += 1", "pass"),
        ("statement", 'raise ValueError(f"{x} is below {low + 1}")', "pass"),
        ("context", 'with open("x"):', "with __import__('contextlib').nullcontext():"),
    ],
)
def test_what_is_changed(kind: str, before: str, after: str) -> None:
    source = SOURCE.replace(b"return max(", b"return sorted(") if kind == "arguments" else SOURCE
    assert (before, after.strip()) in changes(kind, source)


def test_the_extremum_of_swapped_numbers_is_the_same() -> None:
    assert not changes("arguments")


def test_equal_changes_of_equal_lines_are_numbered() -> None:
    source = b"def f(x):\n    y = x + 1\n    y = x + 1\n    return y\n"
    keys = [m.key for m in found(source) if m.site.kind == "arithmetic"]
    assert keys == [
        "package/module.py:f: y = x + 1 => y = x - 1",
        "package/module.py:f: y = x + 1 => y = x - 1 #1",
    ]
    assert [m.key for m in found(b"\n" + source) if m.site.kind == "arithmetic"] == keys


def test_a_diff_has_the_line_and_its_neighbours() -> None:
    (one,) = [m for m in found() if m.after == "if False:" and m.before == "if value:"]
    assert one.diff(SOURCE).splitlines()[1:] == [
        "     for value in (v for v in (low, x) if v):",
        "-        if value:",
        "+        if False:",
        "             continue",
    ]


def test_a_sample_takes_kinds_in_turn_and_depends_on_its_seed_only() -> None:
    kinds = {m.site.kind for m in found()}
    first = sample(found(), len(kinds), 0)
    assert {m.site.kind for m in first} == kinds
    assert sample(found(), len(kinds), 0) == first != sample(found(), len(kinds), 1)
    assert sample(found(), 30, 0)[: len(kinds)] == first, "a larger budget adds to a smaller one"
    everything = sample(found(), 10_000, 0)
    assert sorted(m.key for m in everything) == sorted(m.key for m in found())


def test_bodies_of_functions_are_found_by_dotted_name() -> None:
    source = (
        b"class A:\n    x = 1\n\n    def f(\n        self,\n    ):\n        return 1\n\n\n"
        b"def f():\n    return 2\n"
    )
    assert body_lines(source, "A.f") == (7, 8)
    assert body_lines(source, "f") == (11, 12)
    assert body_lines(source, "A") == body_lines(source, "") == body_lines(source, "g") == (0, 0)


def test_what_was_recorded_moves_with_the_lines_of_a_module() -> None:
    old, new = "a\nb\nc\nd\n", "x\na\nb\nC\nd\n"
    assert moved_lines(old, new) == {1: 2, 2: 3, 4: 5}
    entry = {"sha256": "0", "tests": {"t": {"seconds": 1.0, "lines": {"m": [1, 3, 4], "n": [1]}}}}
    assert moved_entry(entry, {"m": moved_lines(old, new)}) == {
        "sha256": "0",
        "tests": {"t": {"seconds": 1.0, "lines": {"m": [2, 5]}}},
    }


class Texts:
    """Plays the tree: files by name."""

    def __init__(self, **texts: str) -> None:
        self.texts = {name.replace("__", "/") + ".py": text for name, text in texts.items()}

    def source(self, name: str) -> bytes:
        return self.texts[name].encode()


def covering(**tests: tuple[float, list[int]]) -> dict[str, object]:
    lines = {name: (seconds, ran) for name, (seconds, ran) in tests.items()}
    return {
        "tests": {
            name: {"seconds": seconds, "lines": {"p/part/m.py": ran} if ran else {}}
            for name, (seconds, ran) in lines.items()
        }
    }


def test_tests_that_ran_the_line_come_by_folder_and_time() -> None:
    module = "LIMIT = 3\n\n\ndef f(x, y=1):\n    x += 1\n    return x - y\n"
    tree = Texts(
        p__part__m=module,
        tests__part__test_own="",
        tests__other__test_far="",
        tests__other__test_shared="import p.part.m\n@pytest.fixture(scope='module')\nPopen",
    )
    files = {
        "tests/part/test_own.py": covering(slow=(3.0, [5, 6]), fast=(1.0, [5]), none=(0.1, [])),
        "tests/other/test_far.py": covering(quick=(0.2, [5, 6]), never=(0.1, [])),
        "tests/other/test_shared.py": covering(one=(0.5, []), two=(0.5, [])),
    }
    for file, entry in files.items():
        entry["tests"] = {f"{file}::{n}": t for n, t in entry["tests"].items()}  # type: ignore[attr-defined]
    selection = Selection(tree, files)  # type: ignore[arg-type]

    def names(before: str, after: str, cap: float = 60.0) -> tuple[list[str], bool]:
        found = mutations("p/part/m.py", module.encode())
        (one,) = [m for m in found if (m.before, m.after) == (before, after)]
        selected = selection.tests(one, cap)
        return [test.partition("::")[2] for test in selected.tests], selected.capped

    shared = ["one", "two"]
    assert names("x += 1", "x -= 1") == (["fast", "slow", "quick", *shared], False)
    assert names("return x - y", "return x + y") == (["slow", "quick", *shared], False)
    everything = (["fast", "slow", "quick", *shared], False)
    assert names("LIMIT = 3", "LIMIT = 4") == everything, "runs once, in whoever imports first"
    assert names("def f(x, y=1):", "def f(x, y=2):") == everything
    assert names("x += 1", "x -= 1", cap=4.1) == (["fast", "slow"], True)
    selection.drop("tests/part/test_own.py::fast")
    assert names("x += 1", "x -= 1") == (["slow", "quick", *shared], False)


def test_each_equivalent_change_has_a_reason() -> None:
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))["equivalent"]
    changes = [entry["change"] for entry in entries]
    assert changes == sorted(set(changes)), "by name, so that two people's additions do not meet"
    assert all(" => " in change for change in changes)
    assert all(len(entry["reason"].split()) >= 4 for entry in entries)


# ---- a whole campaign ---------------------------------------------------------------------------

MODULE = """\
def slow(x):
    while x:
        x -= 1
    return x


def sign(x):
    if x < 0:
        return -1
    return 1


def unseen(x):
    return x + 1
"""
TESTS = """\
from package.part.module import sign, slow


def test_sign():
    assert sign(-2) == -1
    assert sign(3) == 1


def test_slow():
    assert slow(3) == 0
"""
#: Passes the first time only: what it "notices" is no change's doing.
FLAKY = """\
from pathlib import Path

from package.part.module import unseen


def test_flaky():
    unseen(1)
    mark = Path(__file__).with_name("mark")
    assert not mark.exists()
    mark.touch()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tiny package with tests that miss a few things."""
    root = tmp_path / "checkout"
    (root / "package" / "part").mkdir(parents=True)
    (root / "tests" / "part").mkdir(parents=True)
    for folder in (root / "package", root / "package" / "part"):
        (folder / "__init__.py").write_text("")
    (root / "package" / "part" / "module.py").write_text(MODULE)
    (root / "tests" / "part" / "test_module.py").write_text(TESTS)
    (root / "tests" / "part" / "test_flaky.py").write_text(FLAKY)
    (root / "pytest.ini").write_text("[pytest]\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def run(root: Path, results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(results), "package/part/module.py", *options]
    command += ["--root", str(root), "--equivalent", str(root / "equivalent.toml")]
    command += ["--budget", "100", "--spare-seconds", "4"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def statuses(results: Path) -> dict[str, str]:
    kept = json.loads(results.read_text())["mutants"]
    return {key.partition(":")[2]: value["status"] for key, value in kept.items()}


@pytest.mark.slow
def test_a_campaign_finds_what_no_test_notices_and_goes_on(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The names of tests that fail are read from pytest's log: whole, and without colours.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    results = tmp_path / "results.json"
    before = {p: p.read_bytes() for p in sorted(checkout.rglob("*.py"))}
    for _ in range(3):  # on a busy machine a test may reach its time limit and seem to notice
        for kept in (results, results.with_suffix(".coverage.json")):
            kept.unlink(missing_ok=True)
        (checkout / "tests" / "part" / "mark").unlink(missing_ok=True)
        made = run(checkout, results)
        assert made.returncode == 1, made.stdout + made.stderr
        found = statuses(results)
        if found["unseen: return x + 1 => return x - 1"] == "survived":
            break
    assert found["sign: if x < 0: => if x >= 0:"] == "killed"
    assert found["sign: if x < 0: => if x <= 0:"] == "survived"
    # On a busy machine the test's own time limit may end it first.
    assert found["slow: x -= 1 => pass"] in ("timeout", "killed")
    assert found["unseen: return x + 1 => return x - 1"] == "survived"
    flaky = "tests/part/test_flaky.py::test_flaky"
    assert f"fails without any change, left out: {flaky}" in made.stdout
    assert "-    if x < 0:\n+    if x <= 0:" in made.stdout
    assert {p: p.read_bytes() for p in sorted(checkout.rglob("*.py"))} == before

    # The rest is known already; what is declared equivalent is left out, what is stale is named.
    (checkout / "equivalent.toml").write_text(
        '[[equivalent]]\nchange = "package/part/module.py:sign: if x < 0: => if x <= 0:"\n'
        'reason = "a test of a test"\n[[equivalent]]\n'
        'change = "package/part/module.py:sign: gone => away"\nreason = "it was there once"\n'
    )
    test = checkout / "tests" / "part" / "test_module.py"
    more = "from package.part.module import unseen\n\n\ndef test_it():\n    assert unseen(1) == 2\n"
    test.with_name("test_more.py").write_text(more)
    again = run(checkout, results, "--retry")
    lines = [line for line in again.stdout.splitlines() if line.startswith("[")]
    assert "no longer in the code: package/part/module.py:sign: gone => away" in again.stdout
    assert "1 equivalent ones left out" in again.stdout
    assert any("killed" in line and "return x + 1 => return x - 1" in line for line in lines)
    assert not any("if x < 0: => if x >= 0:" in line for line in lines), "not run twice"
