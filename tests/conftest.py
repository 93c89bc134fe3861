"""Shared by all tests: one thread, no GPU unless there is one, a workspace of its own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

# Two torch processes with two threads each on two cores run 50 to 100 times slower than with one.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch
from command_outcome import Outcome
from hypothesis import settings
from toy import add_toys

from cmbench.cli.main import main
from cmbench.plugin import manager as manager_module
from cmbench.plugin.discovery import PluginInfo, installed_plugins
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.records.workspace import Workspace
from cmbench.reporter import Reporter
from cmbench.sweep.context import Context

torch.set_num_threads(1)
# torch's first calls take longer than any deadline; the same examples in every run.
settings.register_profile("cmbench", deadline=None, derandomize=True)
settings.load_profile("cmbench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what cannot run here."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        counts[reason.removeprefix("Skipped: ").partition(":")[0].partition(" (")[0]] += 1
    if counts:
        told = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
        terminalreporter.write_line(f"skipped here: {told}")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the developer reaches a test, and none writes into the checkout."""
    for name in [n for n in os.environ if n.startswith("CMBENCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CMBENCH_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("CMBENCH_DATA", str(tmp_path / "data"))


class Listener(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def plugins() -> PluginManager:
    """A fresh manager with the installed plugins."""
    return load_plugins()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def context(plugins: PluginManager, workspace: Workspace, listener: Listener) -> Context:
    """A context on the CPU that reports to ``listener``."""
    return Context(plugins, workspace, listener, torch.device("cpu"), threads=1)


@pytest.fixture
def cmbench(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process, through the entry point that users call."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        captured = capsys.readouterr()
        code = stopped.value.code
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def toys(context: Context) -> Context:
    """The context with the tests' own method ``toy`` and dataset ``toys``."""
    add_toys(context.plugins)
    return context


@pytest.fixture
def cmbench_with_toys(
    cmbench: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """The command line with the tests' own plugin installed."""
    found = [*installed_plugins(), PluginInfo("toys", "toy:PLUGIN", "toy-distribution", "1.2.3")]
    monkeypatch.setattr(manager_module, "installed_plugins", lambda: found)
    return cmbench


@pytest.fixture
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of a few features count as those of any extractor, which spares tests minutes."""
    from cmbench.metrics import reference_import  # imports torch

    monkeypatch.setattr(reference_import, "_require_width", lambda *_: None)
