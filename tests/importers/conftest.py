"""Fixtures of the tests of imported checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_outcome import Outcome
from patches import RECIPES, Patches

from cmbench.plugin import manager as manager_module
from cmbench.plugin.discovery import PluginInfo, installed_plugins
from cmbench.sweep.context import Context


@pytest.fixture
def patches(context: Context) -> Context:
    """A context with a dataset of the golden networks' shape."""
    context.plugins.register(Patches(), PluginInfo("patches", "patches", "tests", "1"))
    return context


@pytest.fixture
def cmbench_with_patches(
    cmbench: Callable[..., Outcome], patches: Context, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """The command line with the dataset installed, on the workspace of ``patches``."""
    found = [*installed_plugins(), PluginInfo("patches", "patches:PLUGIN", "tests", "1")]
    monkeypatch.setattr(manager_module, "installed_plugins", lambda: found)
    return cmbench


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "own.toml"
    path.write_text(RECIPES)
    return f"{path}:tiny"
