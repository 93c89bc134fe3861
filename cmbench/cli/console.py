"""Progress on stderr: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from cmbench.cli.output import echo, printable
from cmbench.reporter import Reporter


def make_reporter(quiet: bool = False) -> Reporter:
    """Return the reporter for a terminal or for a log."""
    if quiet:
        return Reporter()
    return RichReporter() if sys.stderr.isatty() else PlainReporter()


class PlainReporter(Reporter):
    """One line every few seconds, for logs and pipes."""

    def __init__(self, every_s: float = 10.0) -> None:
        self.every_s = every_s
        self._titles: dict[str, tuple[str, int]] = {}
        self._spoken: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def note(self, text: str) -> None:
        """Print one line."""
        echo(text, err=True)

    def warn(self, text: str) -> None:
        """Print one line that begins with ``warning``."""
        echo(f"warning: {text}", err=True)

    def task_started(self, task: str, title: str, total: int, done: int = 0) -> None:
        """Print what begins."""
        self._titles[task] = (title, total)
        self._spoken[task] = time.monotonic()
        self._began[task] = (time.monotonic(), done)
        resumed = f", resumed at {done}" if done else ""
        self.note(f"{title}: {total} images{resumed}")

    def task_progress(self, task: str, done: int, scalars: Mapping[str, float]) -> None:
        """Print progress every few seconds."""
        now = time.monotonic()
        if now - self._spoken.get(task, 0.0) < self.every_s:
            return
        self._spoken[task] = now
        title, total = self._titles[task]
        began, first = self._began[task]
        rate = (done - first) / max(now - began, 1e-9)
        figures = "".join(
            f", {name.replace('_per_s', '/s')} {value:.4g}"
            for name, value in scalars.items()
            if name in ("loss", "images_per_s")
        )
        eta = (total - done) / rate if rate > 0 else float("nan")
        self.note(f"{title}: {done}/{total} ({done / max(total, 1):.0%}){figures}, ETA {eta:.0f} s")


class RichReporter(Reporter):
    """Progress bars with loss, images/s and the remaining time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskID,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True)
        self._progress: Any = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._tasks: dict[str, TaskID] = {}

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(printable(text), markup=False, highlight=False, style="dim")

    def warn(self, text: str) -> None:
        """Print one line in yellow."""
        self.console.print(
            f"warning: {printable(text)}", markup=False, highlight=False, style="yellow"
        )

    def task_started(self, task: str, title: str, total: int, done: int = 0) -> None:
        """Show a bar."""
        if not self._tasks:
            self._progress.start()
        from rich.markup import escape

        self._tasks[task] = self._progress.add_task(
            escape(printable(title)), total=total, completed=done, figures=""
        )

    def task_progress(self, task: str, done: int, scalars: Mapping[str, float]) -> None:
        """Move the bar."""
        parts = [f"loss {scalars['loss']:.4g}"] if "loss" in scalars else []
        if "images_per_s" in scalars:
            parts.append(f"{scalars['images_per_s']:.0f} images/s")
        self._progress.update(self._tasks[task], completed=done, figures="  ".join(parts))

    def task_finished(self, task: str) -> None:
        """Remove the bar."""
        if task in self._tasks:
            self._progress.remove_task(self._tasks.pop(task))
        if not self._tasks:
            self._progress.stop()
