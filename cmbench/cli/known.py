"""What a verb can refuse before it imports torch: names that no plugin has, and bad overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cmbench.sweep.combinations import require_few, stated_axes
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
    seeds: Sequence[int] | None = None,
) -> None:
    """Raise ``UserError`` as planning would, for what the plugins' specs and recipes can tell.

    ``seeds`` are those of a sweep, whose overrides may have several values.
    """
    specs = [plugins.methods.get(name, who) for name in methods]
    require_once(overrides)
    table = parse_overrides(overrides, several=seeds is not None)
    if seeds is not None:
        require_few(stated_axes(table), len(seeds))
    if dataset not in plugins.datasets.specs:
        from cmbench.data.custom import resolve_dataset  # imports pydantic
        from cmbench.data.locations import DataLocations

        dataset = resolve_dataset(dataset, plugins.datasets.specs, DataLocations(), who).name
    for spec in specs:
        recipe_table(spec, dataset, recipe or default_recipe(spec, dataset))
