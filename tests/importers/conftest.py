"""Fixtures of the tests of imported checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from patches import RECIPES, Patches

from cmbench.plugin.discovery import PluginInfo
from cmbench.sweep.context import Context


@pytest.fixture
def patches(context: Context) -> Context:
    """A context with a dataset of the golden networks' shape."""
    context.plugins.register(Patches(), PluginInfo("patches", "patches", "tests", "1"))
    return context


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "own.toml"
    path.write_text(RECIPES)
    return f"{path}:tiny"
