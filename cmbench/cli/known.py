"""What a verb can refuse before it imports torch: names that no plugin has, and bad overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cmbench.sweep.recipes import default_recipe, parse_overrides, recipe_table, require_once

if TYPE_CHECKING:
    from cmbench.plugin.manager import PluginManager


def require_known(
    plugins: PluginManager,
    who: str,
    *,
    methods: Sequence[str],
    dataset: str,
    recipe: str | None,
    overrides: Sequence[str],
) -> None:
    """Raise ``UserError`` as planning would, for what the plugins' specs and recipes can tell."""
    specs = [plugins.methods.get(name, who) for name in methods]
    require_once(overrides)
    parse_overrides(overrides)
    if dataset not in plugins.datasets.specs:
        from cmbench.data.custom import resolve_dataset  # imports pydantic
        from cmbench.data.locations import DataLocations

        dataset = resolve_dataset(dataset, plugins.datasets.specs, DataLocations(), who).name
    for spec in specs:
        recipe_table(spec, dataset, recipe or default_recipe(spec, dataset))
