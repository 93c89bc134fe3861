"""What long work tells the person who waits; the CLI draws it, tests collect it."""

from __future__ import annotations

from collections.abc import Mapping


class Reporter:
    """Silent by default; subclasses show what they want."""

    def note(self, text: str) -> None:
        """Say one line."""

    def warn(self, text: str) -> None:
        """Say one line that deserves attention."""

    def task_started(self, task: str, title: str, total: int, done: int = 0) -> None:
        """Begin a task that is counted in images."""

    def task_progress(self, task: str, done: int, scalars: Mapping[str, float]) -> None:
        """Report images done, and figures such as loss and images/s."""

    def task_finished(self, task: str) -> None:
        """End a task."""
