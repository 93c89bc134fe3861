"""What the functions of the Python interface share: where they work and what they say."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TypedDict

from cmbench.plugin.manager import load_plugins
from cmbench.records.workspace import Workspace
from cmbench.reporter import Reporter
from cmbench.sweep.asked import MAX_THREADS, as_count
from cmbench.sweep.context import Context, choose_device
from cmbench.sweep.threads import choose_threads, use_threads


class PythonReporter(Reporter):
    """Turns warnings into Python's; progress is not shown."""

    def warn(self, text: str) -> None:
        """Warn with a :class:`UserWarning` at the line that called cmbench."""
        level, frame = 1, sys._getframe()
        while frame.f_back and str(frame.f_globals.get("__name__", "")).startswith("cmbench."):
            level, frame = level + 1, frame.f_back
        warnings.warn(text, stacklevel=level)


class Where(TypedDict, total=False):
    """Keyword arguments that the functions share.

    Attributes:
        workspace: folder of runs, records, reports and caches; by default ``$CMBENCH_WORKSPACE``,
            or ``cmbench-out`` in the current folder.
        device: ``auto`` (the default), ``cpu``, ``cuda`` or ``cuda:1``.
        threads: CPU threads; by default the number of free cores.
        compiled: whether networks are compiled; by default on CUDA.
        reporter: shows progress; by default only warnings are shown.
    """

    workspace: str | Path | None
    device: str
    threads: int | None
    compiled: bool | None
    reporter: Reporter | None


def open_context(call: str, where: Where) -> Context:
    """Return plugins, workspace and device; ``call`` is what records name as their command.

    Raises:
        TypeError: an argument does not exist.
        UserError: the device is unknown.
        MissingError: the device is not here.
    """
    for name in where.keys() - Where.__annotations__.keys():
        raise TypeError(
            f"{call}() got an unexpected keyword argument {name!r}; of those that all functions "
            f"share there are {', '.join(Where.__annotations__)}"
        )
    plugins, reporter = load_plugins(), where.get("reporter") or PythonReporter()
    for info in plugins.failed:
        reporter.warn(f"{info}: {info.error}")
    workspace, compiled = where.get("workspace"), where.get("compiled")
    device = choose_device(str(where.get("device", "auto")))
    threads = where.get("threads")
    threads = choose_threads() if threads is None else as_count(threads, "threads", 1, MAX_THREADS)
    use_threads(threads)
    return Context(
        plugins,
        Workspace.choose(str(workspace) if workspace is not None else None),
        reporter,
        device,
        threads=threads,
        command=call,
        compile=device.type == "cuda" if compiled is None else compiled,
        device_found=where.get("device", "auto") == "auto",
    )
