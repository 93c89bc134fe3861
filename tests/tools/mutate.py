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
import json
import math
import os
import re
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from coverage_map import Selected, Selection, Unit, record, sha256
from mutant_tree import Tree
from mutations import Mutation, mutations, sample

ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
#: A mutant may take this many times the clean time of its tests, besides --spare-seconds.
SLOWER = 3.0
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


@dataclass(frozen=True)
class Result:
    """What became of a mutant."""

    status: str  # killed, survived, timeout or untested
    seconds: float
    tests: int
    #: not all of its tests were run, as they would take too long
    capped: bool
    diff: str


# ---- the campaign -------------------------------------------------------------------------------


class Runner:
    """Runs mutants one after the other."""

    def __init__(self, tree: Tree, selection: Selection, cap: float, spare_seconds: float) -> None:
        self.tree, self.selection = tree, selection
        self.cap, self.spare_seconds = cap, spare_seconds
        #: whether a test passes without any change, asked once of each that notices one
        self._sound: dict[str, bool] = {}

    def attempt(self, mutation: Mutation) -> Result:
        """Run a mutation's tests with it applied, and put the module back."""
        tree, clean = self.tree, self.tree.source(mutation.module)
        began = time.monotonic()
        while True:
            selected = self.selection.tests(mutation, self.cap)
            status = "untested"
            if selected.tests:
                tree.write(mutation.module, mutation.applied(clean))
                try:
                    code = self.run(selected)
                finally:
                    tree.write(mutation.module, clean)
                status = "timeout" if code is None else "survived" if code == 0 else "killed"
            if status != "killed" or self.sound(self.failed(selected.tests)):
                break
        seconds, count = round(time.monotonic() - began, 1), len(selected.tests)
        return Result(status, seconds, count, selected.capped, mutation.diff(clean))

    def run(self, selected: Selected) -> int | None:
        """Run tests until one fails; return pytest's exit code, None if they took too long."""
        patience = f"--timeout={math.ceil(3 * self.spare_seconds + 10 * selected.slowest)}"
        limit = SLOWER * selected.seconds + self.spare_seconds
        return self.tree.run(lambda: self.tree.pytest(["-x", patience, *selected.tests]), limit)

    def failed(self, tests: Sequence[str]) -> str:
        """Return the test that failed in the last run; empty if it was none of them by itself."""
        log = self.tree.log.read_text(encoding="utf-8", errors="replace")
        return next(
            (t for t in tests if re.search(rf"^(FAILED|ERROR) {re.escape(t)}( - |$)", log, re.M)),
            "",
        )

    def sound(self, test: str) -> bool:
        """Say whether a test passes without any change; one that does not is never run again."""
        if test not in self._sound:
            one = Selected([Unit((test,) if test else (), self.cap, True)])
            self._sound[test] = not test or self.run(one) == 0
            if not self._sound[test]:
                print(f"fails without any change, left out: {test}", flush=True)
                self.selection.drop(test)
        return self._sound[test]


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
        runner = Runner(tree, selection, arguments.cap, arguments.spare_seconds)
    for number, mutation in enumerate(wanted, start=1):
        result = runner.attempt(mutation)
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
