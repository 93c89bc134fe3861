"""Which lines each test runs, how long it takes, and which tests to run for a mutation."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

import pytest
from mutant_tree import Tree
from mutations import Mutation

#: Test files whose tests share what one of them makes, and those that start other processes.
SHARED_FIXTURE = re.compile(r"scope=.(module|session)|@cache\b")
OTHER_PROCESSES = re.compile(r"\bfork\b|get_context|subprocess|Popen")


class Covered(TypedDict):
    """One test: its clean processor time in seconds and the lines it ran, by module."""

    seconds: float
    lines: dict[str, list[int]]


def processor_seconds() -> float:
    """Return what this process and its children have used: it depends little on others' load."""
    return sum(os.times()[:4])


class Recorder:
    """Traces the modules ``names`` (their paths by file name) while tests run.

    What a fixture of wider scope, a cache or another process runs is not seen in every test.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.tests: dict[str, Covered] = {}
        self.not_passed: list[str] = []
        self._lines: dict[str, set[int]] = defaultdict(set)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, None]:
        """Trace one test with its fixtures."""
        self._lines = defaultdict(set)
        began = processor_seconds()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        yield
        sys.settrace(None)
        threading.settrace(None)
        seconds = round(processor_seconds() - began, 4)
        lines = {name: sorted(found) for name, found in self._lines.items()}
        self.tests[item.nodeid] = {"seconds": seconds, "lines": lines}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Drop tests that fail or are skipped: they notice nothing."""
        if report.outcome != "passed":
            self.not_passed.append(report.nodeid)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = self.names.get(frame.f_code.co_filename)
        if name is None:
            return None
        seen = self._lines[name]

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line":
                seen.add(frame.f_lineno)
            return local

        return local


# ---- recording ----------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    """Return the hash that says whether a file has changed."""
    return hashlib.sha256(data).hexdigest()


def files_of_tests(tree: Tree, modules: Iterable[str]) -> list[str]:
    """Return the test files of the modules' layers: their folders, what imports one, the CLI's."""
    layers = {module.split("/")[-2] for module in modules}
    package = next(iter(modules)).split("/")[0]
    imports = re.compile(rf"\b{package}\.({'|'.join(sorted(layers))})\b")
    found = []
    for path in sorted((tree.folder / "tests").rglob("test_*.py")):
        folder = path.parent.name
        mine = folder in layers | {"cli"} or imports.search(path.read_text(encoding="utf-8"))
        if mine and folder not in ("e2e", "tools"):
            found.append(path.relative_to(tree.folder).as_posix())
    return found


def record(tree: Tree, modules: Sequence[str], kept: Path) -> dict[str, dict[str, Any]]:
    """Return the tests by test file, with the lines they ran; run those files that have changed.

    Where a module has changed, lines that it still has are found again; a new module has all run.
    """
    old: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"sources": {}}
    sources = {module: tree.source(module).decode() for module in modules}
    known: dict[str, dict[str, Any]] = {}
    if sources.keys() <= old["sources"].keys():
        moves = {m: moved_lines(old["sources"][m], text) for m, text in sources.items()}
        known = {file: moved_entry(entry, moves) for file, entry in old["files"].items()}
    files: dict[str, dict[str, Any]] = {}
    for file in files_of_tests(tree, modules):
        digest = sha256(tree.source(file))
        files[file] = known.get(file, {})
        if files[file].get("sha256") != digest:
            print(f"recording {file}", flush=True)
            files[file] = {"sha256": digest, "tests": record_file(tree, modules, file)}
            kept.write_text(json.dumps({"sources": sources, "files": known | files}))
    kept.write_text(json.dumps({"sources": sources, "files": files}))
    return files


def moved_lines(old: str, new: str) -> dict[int, int]:
    """Return the numbers of the lines of ``old`` that ``new`` still has, counted from 1."""
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    return {
        block.a + i + 1: block.b + i + 1
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    }


def moved_entry(entry: Mapping[str, Any], moves: Mapping[str, Mapping[int, int]]) -> dict[str, Any]:
    """Return what was recorded of a test file, in terms of the modules as they are now."""
    tests = {
        name: {
            **test,
            "lines": {
                module: [moves[module][line] for line in lines if line in moves[module]]
                for module, lines in test["lines"].items()
                if module in moves
            },
        }
        for name, test in entry["tests"].items()
    }
    return {**entry, "tests": tests}


def record_file(tree: Tree, modules: Sequence[str], file: str) -> dict[str, Any]:
    """Run one test file with its lines traced; return its passing tests."""
    found = tree.folder.parent / "recorded.json"
    found.unlink(missing_ok=True)

    def work() -> int:
        recorder = Recorder({str(tree.folder / module): module for module in modules})
        code = tree.pytest([file], [recorder])
        passed = {k: v for k, v in recorder.tests.items() if k not in recorder.not_passed}
        found.write_text(json.dumps(passed))
        return code

    code = tree.run(work, 1800.0)
    if code not in (0, 5):
        print(f"  exit code {code}: tests that failed are left out", flush=True)
    loaded: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {}
    return loaded


@dataclass(frozen=True)
class Unit:
    """Tests that are run together: one, or all of a file in which they share a fixture."""

    tests: tuple[str, ...]
    seconds: float
    #: whether one of them is known to run the line
    hits: bool


class Selected:
    """The tests of one mutation, in the order in which they are run."""

    def __init__(self, units: Sequence[Unit], *, capped: bool = False) -> None:
        self.tests = [test for unit in units for test in unit.tests]
        #: clean time, and that of the slowest unit
        self.seconds = sum(unit.seconds for unit in units)
        self.slowest = max((unit.seconds for unit in units), default=0.0)
        #: whether some were left out, as all would take too long
        self.capped = capped


class Selection:
    """Chooses the tests of a mutation from what was recorded."""

    def __init__(self, tree: Tree, files: Mapping[str, dict[str, Any]]) -> None:
        self.files = files
        self.texts = {file: tree.source(file).decode() for file in files}
        self.sources = tree.source

    def tests(self, mutation: Mutation, cap: float) -> Selected:
        """Return the tests of a mutation, at most ``cap`` seconds of them.

        Those in the folder of the module's layer come first, then those known to run the line, and
        among them the fast ones.
        """
        module, site = mutation.module, mutation.site
        own = f"tests/{module.split('/')[-2]}/"
        line = range(site.first_line, site.last_line + 1)
        body = range(*body_lines(self.sources(module), site.function))
        # What is outside of functions, defaults among it, runs once, in whoever imports first.
        steps = (line, body, None) if line.start in body else (body, None) if body else (None,)
        for wanted in steps:
            units = list(self._units(module, wanted, certain=wanted is line))
            if any(unit.hits for unit in units):
                break
        units.sort(key=lambda u: (not u.tests[0].startswith(own), not u.hits, u.seconds))
        chosen: list[Unit] = []
        for unit in units:
            if chosen and sum(u.seconds for u in chosen) + unit.seconds > cap:
                return Selected(chosen, capped=True)
            chosen.append(unit)
        return Selected(chosen)

    def drop(self, test: str) -> None:
        """Never choose a test again."""
        del self.files[test.partition("::")[0]]["tests"][test]

    def _units(self, module: str, wanted: range | None, *, certain: bool) -> Iterator[Unit]:
        """Yield the tests that ran a wanted line (any, if None), and those that may have.

        Other processes are not traced: tests of a file that starts some may run the module unseen.
        Where such tests are not the only ones (``certain``), the file must import the module.
        """
        dotted = module.removesuffix(".py").replace("/", ".")
        for file, entry in self.files.items():
            lines = {n: set(t["lines"].get(module, ())) for n, t in entry["tests"].items()}
            hits = {n for n, ran in lines.items() if (ran if wanted is None else {*wanted} & ran)}
            text = self.texts[file]
            imports = dotted in text or (not certain and any(lines.values()))
            possible = bool(OTHER_PROCESSES.search(text)) and imports
            seconds = {name: test["seconds"] for name, test in entry["tests"].items()}
            if seconds and SHARED_FIXTURE.search(text) and (hits or possible):
                yield Unit(tuple(seconds), sum(seconds.values()), bool(hits))
            else:
                for name in seconds if possible else hits:
                    yield Unit((name,), seconds[name], name in hits)


def body_lines(source: bytes, name: str) -> tuple[int, int]:
    """Return the lines of a function's body by its dotted name: the first, the one after.

    Of a class, a module or an unknown name it is (0, 0).
    """
    found: ast.AST = ast.parse(source)
    for part in filter(None, name.split(".")):
        inner = (n for n in ast.walk(found) if n is not found and getattr(n, "name", "") == part)
        found = next(inner, ast.Module([], []))
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return 0, 0
    return found.body[0].lineno, (found.end_lineno or 0) + 1
