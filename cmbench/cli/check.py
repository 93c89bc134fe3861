"""``cmbench check``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from cmbench.cli.options import argument, flag, option, takes
from cmbench.cli.output import echo
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK

if TYPE_CHECKING:
    from cmbench.testing.check import CheckResult


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What the user asked of `cmbench check`."""

    methods: tuple[str, ...] = argument(nargs=-1, metavar="[METHOD]...")
    dataset: str | None = option(
        "--dataset",
        "-d",
        metavar="NAME",
        help="Dataset whose recipe is checked.  [default: the smallest, and the smallest with "
        "pictures]",
    )
    as_json: bool = flag("--json", help="Print every check as JSON.")


@click.command()
@takes(CheckOptions)
def check(options: CheckOptions) -> int:
    """Check that methods keep the contract of docs/plugins.md, on tiny networks.

    Without METHOD every installed method is checked, and plugins that cannot be loaded are failures
    too. Prints one line per failed check and a summary per method; --json says why checks were not
    made. Exits 1 if a check failed.
    """
    if "torch" not in sys.modules:  # checks fork, which a process that sees a GPU cannot
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from cmbench.plugin.manager import load_plugins

    manager = load_plugins()
    for name in options.methods:
        manager.methods.get(name, "cmbench check")  # before torch is imported
    from cmbench.sweep.threads import use_threads
    from cmbench.testing.suite import broken_plugins, check_method

    use_threads(1)
    found = [] if options.methods else list(broken_plugins(manager))
    for result in found:
        show(result, options)
    for name in dict.fromkeys(options.methods or sorted(manager.methods.specs)):
        mine = []
        for result in check_method(manager, name, options.dataset):
            show(result, options)
            mine.append(result)
        if not options.as_json:
            echo(summary(name, mine))
        found += mine
    if options.as_json:
        echo(json.dumps([asdict(result) for result in found], indent=1))
    return EXIT_CELLS_FAILED if any(result.problem for result in found) else EXIT_OK


def show(result: CheckResult, options: CheckOptions) -> None:
    """Print a check that failed."""
    if result.problem and not options.as_json:
        echo(f"FAILED {result}")


def summary(name: str, found: list[CheckResult]) -> str:
    """Return a method's line: how many checks, where, which were not made, how long they took."""
    failed, skipped = (sum(map(bool, x)) for x in zip(*((r.problem, r.skipped) for r in found)))
    counts = [f"{len(found) - failed - skipped} passed"]
    if failed:
        counts.append(f"{failed} failed")
    if skipped:
        names = dict.fromkeys(r.check for r in found if r.skipped)
        counts.append(f"{skipped} not made ({', '.join(names)})")
    where = ", ".join(dict.fromkeys(r.dataset for r in found if r.dataset)) or "no dataset"
    return f"{name} on {where}: {', '.join(counts)}, {sum(r.seconds for r in found):.1f} s"
