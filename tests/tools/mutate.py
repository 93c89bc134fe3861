"""Mutation campaign: change the code in many small ways and see whether a test fails.

    python tests/tools/mutate.py RESULTS.json cmbench/training cmbench/leaderboard --budget 40

Each mutation is applied in a temporary copy of the tree, never in the checkout. The tests that ran
its line are run there until one fails: fast ones first, one process at a time. Results are kept in
``RESULTS.json``, so that an interrupted campaign goes on; ``--retry`` runs its survivors again.
Which test runs which lines is recorded once, in ``RESULTS.coverage.json``, and again for files that
have changed. Mutations that change nothing observable are in ``equivalent.toml``, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mutations import Mutation, mutations, sample

ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
#: A mutant may take this many times the clean time of its tests, besides --spare-seconds.
SLOWER = 3.0
#: Ends a test in which processes wait for each other for ever, by the clock.
PATIENCE = "--timeout={}"
#: Slow imports that the tests share: made once, before the processes of the mutants are forked.
WARM = (
    "torch",
    "torchvision",
    "pandas",
    "scipy.stats",
    "pydantic",
    "hypothesis",
    "pytest",
    "jinja2",
)
#: Test files whose tests share what one of them makes, and those that start other processes.
SHARED_FIXTURE = re.compile(r"scope=.(module|session)|@cache\b")
OTHER_PROCESSES = re.compile(r"\bfork\b|get_context|subprocess|Popen")


@dataclass(frozen=True)
class Result:
    """What became of a mutant."""

    status: str  # killed, survived, timeout or untested
    seconds: float
    tests: int
    #: not all of its tests were run, as they would take too long
    capped: bool
    diff: str


class Tree:
    """A temporary copy of the checkout in which modules are changed and tests run."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder / "tree"
        command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (root / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.folder / name)
        if (self.folder / "plugins").is_dir():  # installed under this name
            (self.folder / "cmbench_plugins").symlink_to("plugins")
        self.log = folder / "pytest.log"
        self.temporary = folder / "tmp"

    def source(self, module: str) -> bytes:
        """Return a module's clean source."""
        return (self.folder / module).read_bytes()

    def write(self, module: str, source: bytes) -> None:
        """Change a module; its compiled file could look as new as the source, so it goes."""
        path = self.folder / module
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        path.write_bytes(source)

    def pytest(self, arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
        """Run pytest in this process, which must be a child made for it; return its exit code."""
        import pytest

        os.chdir(self.folder)
        sys.path[0] = str(self.folder)
        os.environ["PYTHONPATH"] = str(self.folder)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False  # else each mutant would compile the whole package
        common = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={self.temporary}"]
        return int(pytest.main([*common, *arguments], list(plugins)))

    def run(self, work: Callable[[], int], limit: float) -> int | None:
        """Do ``work`` in a forked process; return its exit code, or None if it took too long.

        ``limit`` is in seconds of the processor. Who waits for ever is stopped after five times as
        many by the clock, so that a busy machine makes no mutant look slow.
        """
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setsid()
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
                code = work()
            finally:
                os._exit(code)
        ended = time.monotonic() + 5 * limit
        found = (0, 0)
        while not found[0] and time.monotonic() < ended:
            time.sleep(0.02)
            found = os.waitpid(child, os.WNOHANG)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # the child, or what it has left behind
        if not found[0]:
            os.waitpid(child, 0)
            return None
        code = os.waitstatus_to_exitcode(found[1])
        return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code


# ---- which tests --------------------------------------------------------------------------------


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
    """Return the tests by test file, with the lines they ran; run those files that have changed."""
    old: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    hashes = {module: sha256(tree.source(module)) for module in modules}
    known: dict[str, dict[str, Any]] = old.get("files", {})
    moved = {m for m, h in hashes.items() if old.get("modules", {}).get(m) != h}
    files = files_of_tests(tree, modules)
    fresh: dict[str, dict[str, Any]] = {}
    for file in files:
        entry = known.get(file)
        digest = sha256(tree.source(file))
        seen = {m for t in entry["tests"].values() for m in t["lines"]} if entry else set()
        new_modules = moved - old.get("modules", {}).keys()
        if entry and entry["sha256"] == digest and not (seen & moved or new_modules):
            fresh[file] = entry
        else:
            print(f"recording {file}", flush=True)
            fresh[file] = {"sha256": digest, "tests": record_file(tree, modules, file)}
            kept.write_text(json.dumps({"modules": {}, "files": known | fresh}))
    kept.write_text(json.dumps({"modules": hashes, "files": fresh}))
    return fresh


def record_file(tree: Tree, modules: Sequence[str], file: str) -> dict[str, Any]:
    """Run one test file with its lines traced; return its passing tests."""
    from coverage_map import Recorder

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


class Selection:
    """Chooses the tests of a mutation from what was recorded."""

    def __init__(self, tree: Tree, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.files = files
        self.texts = {file: tree.source(file).decode() for file in files}
        self.sources = tree.source

    def tests(self, mutation: Mutation, cap: float) -> tuple[list[str], float, float, bool]:
        """Return tests, their clean seconds, the slowest unit's, and whether ``cap`` cut some.

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
        chosen: list[str] = []
        total = slowest = 0.0
        for unit in units:
            if chosen and total + unit.seconds > cap:
                return chosen, total, slowest, True
            chosen += unit.tests
            total += unit.seconds
            slowest = max(slowest, unit.seconds)
        return chosen, total, slowest, False

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
            if SHARED_FIXTURE.search(text) and (hits or possible):
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


# ---- the campaign -------------------------------------------------------------------------------


def require_clean(
    tree: Tree, mutation: Mutation, selection: Selection, arguments: argparse.Namespace
) -> None:
    """Exit unless the tests of ``mutation`` pass without it, under a mutant's limits."""
    selected = selection.tests(mutation, arguments.cap)
    code = run_tests(tree, selected, arguments.spare_seconds) if selected[0] else 0
    if code != 0:
        sys.exit(f"the unchanged code fails (exit code {code}):\n{tree.log.read_text()[-3000:]}")


def run_tests(
    tree: Tree, selected: tuple[list[str], float, float, bool], spare_seconds: float
) -> int | None:
    """Run selected tests until one fails; return pytest's exit code, None if they took too long."""
    tests, seconds, slowest, _ = selected
    patience = PATIENCE.format(math.ceil(3 * spare_seconds + 10 * slowest))
    limit = SLOWER * seconds + spare_seconds
    return tree.run(lambda: tree.pytest(["-x", patience, *tests]), limit)


def attempt(
    tree: Tree, mutation: Mutation, selection: Selection, cap: float, spare_seconds: float
) -> Result:
    """Run a mutation's tests with it applied, and put the module back."""
    clean = tree.source(mutation.module)
    selected = selection.tests(mutation, cap)
    tests, *_, capped = selected
    diff = mutation.diff(clean)
    if not tests:
        return Result("untested", 0.0, 0, False, diff)
    began = time.monotonic()
    tree.write(mutation.module, mutation.applied(clean))
    try:
        code = run_tests(tree, selected, spare_seconds)
    finally:
        tree.write(mutation.module, clean)
    status = "timeout" if code is None else "survived" if code == 0 else "killed"
    return Result(status, round(time.monotonic() - began, 1), len(tests), capped, diff)


def equivalent_keys(path: Path) -> dict[str, str]:
    """Return the mutations that change nothing observable, each with the reason."""
    if not path.exists():
        return {}
    listed = tomllib.loads(path.read_text(encoding="utf-8")).get("equivalent", [])
    return {entry["change"]: entry["reason"] for entry in listed}


def table(chosen: Sequence[Mutation], results: Mapping[str, Result]) -> str:
    """Return the counts by module, with the share that was noticed."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for mutation in chosen:
        if mutation.key in results:
            for row in (mutation.module, "all"):
                counts[row][results[mutation.key].status] += 1
    columns = ("killed", "timeout", "survived", "untested")
    lines = [f"{'module':44}" + "".join(f"{c:>10}" for c in columns) + f"{'noticed':>10}"]
    for row in [*sorted(counts.keys() - {"all"}), *(["all"] if counts else [])]:
        found = counts[row]
        noticed = (found["killed"] + found["timeout"]) / sum(found.values())
        numbers = "".join(f"{found[column]:>10}" for column in columns)
        lines.append(f"{row:44}{numbers}{noticed:>10.1%}")
    return "\n".join(lines)


def survivors(chosen: Sequence[Mutation], results: Mapping[str, Result]) -> str:
    """Return key and diff of each mutation that no test noticed."""
    parts = []
    for mutation in chosen:
        result = results.get(mutation.key)
        if result is not None and result.status in ("survived", "untested"):
            cut = ", not all of them" if result.capped else ""
            parts.append(f"{mutation.key}\n  {result.tests} tests{cut}\n{result.diff}\n")
    return "\n".join(parts)


def modules_of(root: Path, named: Iterable[str], skipped: Iterable[str]) -> list[str]:
    """Return the modules of folders and files, as paths from the root."""
    found: list[str] = []
    for name in named:
        path = root / name
        found += [str(p.relative_to(root)) for p in (sorted(path.glob("*.py")) or [path])]
    return [name for name in found if name not in set(skipped)]


def load(path: Path, tree: Tree) -> dict[str, Result]:
    """Return the results of an earlier campaign for modules that have not changed since."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    same = {
        module
        for module, digest in kept["modules"].items()
        if (tree.folder / module).exists() and sha256(tree.source(module)) == digest
    }
    results = kept["mutants"].items()
    return {k: Result(**r) for k, r in results if k.partition(":")[0] in same}


def save(path: Path, tree: Tree, results: Mapping[str, Result]) -> None:
    """Write what is known so far."""
    modules = {key.partition(":")[0] for key in results}
    hashes = {module: sha256(tree.source(module)) for module in sorted(modules)}
    kept = {"modules": hashes, "mutants": {k: asdict(r) for k, r in results.items()}}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    temporary.replace(path)


def campaign(arguments: argparse.Namespace, root: Path, folder: Path) -> int:
    """Run what is left of a campaign, print it; return how many changes went unnoticed."""
    tree = Tree(root, folder)
    modules = modules_of(root, arguments.modules, arguments.skip)
    equivalent = equivalent_keys(arguments.equivalent)
    found = [m for module in modules for m in mutations(module, tree.source(module))]
    real = [m for m in found if m.key not in equivalent]
    stale = {k for k in equivalent if k.partition(":")[0] in modules} - {m.key for m in found}
    chosen = sample(real, arguments.budget, arguments.seed)
    results = load(arguments.results, tree)
    wanted = [m for m in chosen if m.key not in results]
    if arguments.retry:
        lost = [k for k, r in results.items() if r.status in ("survived", "untested")]
        wanted += [m for m in real if m.key in lost]
    left_out = f"{len(found) - len(real)} equivalent ones left out"
    print(f"{len(real)} mutations, {left_out}; {len(wanted)} to run")
    for key in sorted(stale):
        print(f"equivalent.toml: no longer in the code: {key}")
    if wanted:
        kept = arguments.results.with_suffix(".coverage.json")
        selection = Selection(tree, record(tree, modules, kept))
        require_clean(tree, wanted[0], selection, arguments)
    for number, mutation in enumerate(wanted, start=1):
        result = attempt(tree, mutation, selection, arguments.cap, arguments.spare_seconds)
        results[mutation.key] = result
        save(arguments.results, tree, results)
        state = f"{result.status:8} {result.seconds:6.1f} s {result.tests:4} tests"
        print(f"[{number}/{len(wanted)}] {state}  {mutation.key}", flush=True)
    if arguments.retry:
        chosen = [m for m in real if m.key in results]
    print(f"\n{survivors(chosen, results)}\n{table(chosen, results)}")
    return sum(results[m.key].status in ("survived", "untested") for m in chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("results", type=Path, help="JSON file of results; made, or gone on with")
    parser.add_argument("modules", nargs="+", help="folders or files of the package to mutate")
    parser.add_argument("--skip", nargs="*", default=[], help="files to leave out")
    parser.add_argument("--budget", type=int, default=40, help="mutations to sample (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--cap", type=float, default=20.0, help="clean seconds of tests per mutant")
    parser.add_argument("--spare-seconds", type=float, default=10.0, help="added to 3 x clean time")
    parser.add_argument("--retry", action="store_true", help="run all kept survivors again as well")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--equivalent", type=Path, default=EQUIVALENT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    os.nice(10)
    for name in WARM if arguments.root == ROOT else ("pytest", "hypothesis"):
        with suppress(ImportError):
            __import__(name)
    with TemporaryDirectory(prefix="cmbench-mutate-") as folder:
        return min(campaign(arguments, arguments.root.resolve(), Path(folder)), 1)


if __name__ == "__main__":
    sys.exit(main())
