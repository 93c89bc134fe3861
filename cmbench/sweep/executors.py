"""Executors: how the runs and cells of a sweep are carried out.

An executor receives independent jobs, each a list of cells of one run, and calls ``work`` on them;
it never decides what a cell is. The built-in one works in this process, one job after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from cmbench.errors import PluginError, blaming
from cmbench.plugin.manager import PluginManager
from cmbench.sweep.plans import CellPlan

#: The cells of one run, which share its training and its weights.
Job = Sequence[CellPlan]


class Executor(Protocol):
    """Carries out jobs."""

    def run(self, jobs: Iterable[Job], work: Callable[[Job], None]) -> None:
        """Call ``work`` once for every job; an exception from it ends the sweep."""


def open_executor(plugins: PluginManager, name: str) -> Executor:
    """Return a registered executor; raise ``PluginError`` if its factory makes none."""
    factory, who = plugins.executors.load(name), f"executor {name!r}"
    with blaming(who, "cannot be made:", remedy="fix the plugin"):
        made: Executor = factory()
    if not callable(getattr(made, "run", None)):
        raise PluginError(
            who,
            f"its factory returned {type(made).__name__}",
            allowed="an object with run(jobs, work)",
            remedy="fix the plugin",
        )
    return made


class Local:
    """This process, job by job."""

    def run(self, jobs: Iterable[Job], work: Callable[[Job], None]) -> None:
        """Call ``work`` on each job in order."""
        for job in jobs:
            work(job)
