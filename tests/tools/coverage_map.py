"""Which lines of which modules each test runs, and how long it takes: a plugin for pytest."""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Generator, Mapping
from types import FrameType
from typing import Any, TypedDict

import pytest


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
