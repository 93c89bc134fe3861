"""What verbs share: parsers of values, the context, stopping, tables."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.options import ComputeOptions
from cmbench.cli.output import echo, printable
from cmbench.errors import LISTED, UserError
from cmbench.files import readable
from cmbench.sweep.asked import MAX_SEEDS, as_nfes, as_seeds, as_sigmas

if TYPE_CHECKING:
    from cmbench.plugin.manager import PluginManager
    from cmbench.reporter import Reporter
    from cmbench.sweep.context import Context
    from cmbench.training.launch import Launch

DEFAULT_DATASET = "digits"
#: Value of --sigmas: the noise levels that `cmbench tune-times` found.
TUNED = "tuned"
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
#: What changes no result: progress, debugging, whether a page is rendered.
_LOCAL_FLAGS = frozenset({"-q", "--quiet", "--debug", "--no-report"})


# ---- values -------------------------------------------------------------------------------------


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return ``1,2,4`` as numbers; raise ``UserError`` for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    return as_nfes(numbers, option, repr(text))


def parse_seeds(text: str, option: str = "--seeds", *, held_out: bool = False) -> tuple[int, ...]:
    """Return ``3`` as seeds 0, 1, 2 and ``4,7`` or ``3-5`` as they are listed.

    Seeds that are ``held_out`` for `cmbench tune-times` are refused unless they are asked for.
    """
    seeds: int | Sequence[int]
    try:
        if text.isdecimal():
            seeds = int(text)
        elif "-" in text:
            first, last = (int(part) for part in text.split("-"))
            seeds = range(first, min(last, first + MAX_SEEDS) + 1)
        else:
            seeds = [int(part) for part in text.split(",") if part]
    except ValueError:
        seeds = []
    return as_seeds(seeds, option, repr(text), held_out=held_out)


def parse_sigmas(text: str, option: str = "--sigmas") -> tuple[float, ...] | str:
    """Return ``80,0.8`` as descending noise levels; ``tuned`` stays as it is."""
    if text == TUNED:
        return text
    try:
        sigmas = [float(part) for part in text.split(",")]
    except ValueError:
        sigmas = []
    return as_sigmas(sigmas, option, repr(text))


def parse_names(text: str, option: str) -> tuple[str, ...]:
    """Return the names in ``a, b``, each once; raise ``UserError`` if one is empty."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        listed = f"{option.strip('-').rstrip('s')}s"
        listing = f"see `cmbench list {listed}`" if listed in LISTED else "remove the empty one"
        raise UserError(option, f"{text!r}", allowed="names with commas between", remedy=listing)
    return names


# ---- the context --------------------------------------------------------------------------------


def debugging() -> bool:
    """Whether `cmbench --debug` was asked for."""
    context = click.get_current_context(silent=True)
    return context is not None and bool((context.find_root().obj or {}).get("debug"))


def verb() -> str:
    """Return the command that runs, for messages: ``cmbench tune-times``."""
    context = click.get_current_context(silent=True)
    return f"cmbench {context.info_name if context is not None else 'run'}"


def command_line() -> str:
    """Return the command that reproduces the result anywhere.

    That is what the user typed, with the program's plain name and without what concerns this
    machine only: the workspace, progress and debugging.
    """
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in ("-w", "--workspace"):
            next(words, None)
        elif not word.startswith(("--workspace=", "-w")) and word not in _LOCAL_FLAGS:
            kept.append(word)
    return shlex.join(["cmbench", *map(readable, kept)])


def reporter_for(quiet: bool, plugins: PluginManager) -> Reporter:
    """Return the reporter; it warns of plugins that failed."""
    from cmbench.cli.console import make_reporter

    reporter = make_reporter(quiet)
    for info in plugins.plugins:
        if line := info.error or info.warning:
            reporter.warn(f"{info}: {line}")
    return reporter


def make_context(
    options: ComputeOptions,
    plugins: PluginManager | None = None,
    should_stop: Callable[[], str | None] = lambda: None,
    launch: Launch | None = None,
    *,
    compiled: bool | None = None,
    split: bool | None = None,
) -> Context:
    """Choose device, threads and reporter; warn of plugins that failed.

    ``launch`` says which of several processes this is: only the first one reports.
    """
    import torch

    from cmbench.plugin.manager import load_plugins
    from cmbench.records.workspace import Workspace
    from cmbench.reporter import Reporter
    from cmbench.sweep.context import Context, choose_device
    from cmbench.sweep.threads import choose_threads, use_threads
    from cmbench.training.launch import Launch

    plugins, launch = plugins or load_plugins(), launch or Launch()
    reporter = reporter_for(options.quiet, plugins) if launch.rank == 0 else Reporter()
    device = choose_device(options.device, launch.local_rank if launch.size > 1 else None)
    if device.type == "cuda" and launch.size > 1:
        torch.cuda.set_device(device)
    threads = options.threads or max(choose_threads() // launch.local_size, 1)
    use_threads(threads)
    return Context(
        plugins,
        Workspace.choose(options.workspace_dir),
        reporter,
        device,
        threads=threads,
        command=command_line(),
        verb=verb(),
        compile=device.type == "cuda" if compiled is None else compiled,
        split=split,
        should_stop=should_stop,
        debug=debugging(),
        device_found=options.device == "auto",
    )


@contextmanager
def stop_asker(
    time_limit_s: float | None, *, patient: bool = False
) -> Iterator[Callable[[], str | None]]:
    """Give a function that says why to stop: a signal arrived, or the time limit is over.

    A second signal interrupts at once; if ``patient`` it must be SIGINT, because launchers pass on
    the SIGTERM that a cluster also sends to every process itself.
    """
    reasons: list[str] = []

    def on_signal(number: int, frame: Any) -> None:
        if reasons and (number == signal.SIGINT or not patient):
            raise KeyboardInterrupt
        if reasons:
            return
        reasons.append(f"stopped by {signal.Signals(number).name}")

    began = time.monotonic()

    def ask() -> str | None:
        if not reasons and time_limit_s and time.monotonic() - began > time_limit_s:
            reasons.append(f"stopped by the time limit of {time_limit_s:g} s")
        return reasons[0] if reasons else None

    here = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS if here}
    try:
        yield ask
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- output -------------------------------------------------------------------------------------


#: Columns of a terminal that tables fit into.
TABLE_WIDTH = 80


def table_width(header: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    """Return the columns that :func:`echo_table` takes, drawn or not."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return sum(widths) + 3 * len(widths) + 1


def echo_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str = "",
    prose: Collection[str] = (),
) -> None:
    """Print a table: drawn on a terminal, plain aligned columns elsewhere.

    The first column and those in ``prose`` are aligned left, the others right.
    """
    left = [index == 0 or name in prose for index, name in enumerate(header)]
    rows = [list(row) for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=printable(title) or None)
        for index, name in enumerate(header):
            table.add_column(escape(printable(name)), justify="left" if left[index] else "right")
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [list(header), *rows]) for i in range(len(header))]
    if title:
        echo(title)
    for line in [list(header), *rows]:
        cells = (
            cell.ljust(width) if flush else cell.rjust(width)
            for cell, width, flush in zip(line, widths, left, strict=True)
        )
        echo("  ".join(cells).rstrip())
