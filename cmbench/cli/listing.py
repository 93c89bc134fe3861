"""``cmbench list``: what plugins register, from the specs alone (no torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cmbench.cli.options import json_option
from cmbench.cli.output import echo
from cmbench.plugin.manager import PluginManager, load_plugins

KINDS = (
    "methods",
    "datasets",
    "metrics",
    "networks",
    "recipes",
    "samplers",
    "extractors",
    "executors",
    "studies",
)

#: Columns of the plain table of each kind.
COLUMNS: dict[str, tuple[str, ...]] = {
    "methods": (
        "name",
        "title",
        "family",
        "year",
        "teacher",
        "data",
        "generated",
        "calls",
        "forwards",
        "nfe",
        "reference",
    ),
    "datasets": ("name", "title", "data_shape", "num_classes", "license"),
    "metrics": ("name", "title", "needs", "reference"),
    "networks": ("name", "title", "reference"),
    "recipes": ("method", "dataset", "recipe"),
    "samplers": ("method", "name", "title", "nfe", "order", "reference"),
    "extractors": ("name", "title", "reference"),
    "executors": ("name", "title"),
    "studies": ("name", "title"),
}


def rows_of(kind: str, manager: PluginManager) -> list[dict[str, Any]]:
    """Return the rows of one kind as plain data, with the plugin that registers each."""
    if kind == "recipes":
        from cmbench.sweep.recipes import recipe_names  # only this kind reads TOML

        return [
            {"method": spec.name, "dataset": dataset, "recipe": recipe}
            for spec in manager.methods.specs.values()
            for dataset, recipe in recipe_names(spec)
        ]
    if kind == "samplers":
        return [
            {"method": spec.name, **sampler._asdict()}
            for spec in manager.methods.specs.values()
            for sampler in spec.samplers
        ]
    registry = getattr(manager, kind)
    rows = []
    for name, spec in registry.specs.items():
        row = {k: _plain(v) for k, v in spec._asdict().items()}
        row |= _cost_columns(row.pop("cost", None), spec)
        rows.append({**row, "plugin": registry.owners[name].distribution})
    if kind == "datasets":
        rows += _own_datasets(registry.specs)
    return rows


def _cost_columns(cost: dict[str, Any] | None, spec: Any) -> dict[str, Any]:
    """Return what a training step takes: calls in words, and in forward passes."""
    if cost is None:
        return {}
    facts = {name: cost[name] for name in ("teacher", "data", "generated", "nfe", "notes")}
    forwards = f"{spec.cost.forward_equivalents:.4g}"
    return facts | {"calls": spec.cost.summary, "forwards": float(forwards)}


def _own_datasets(registered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of datasets that were prepared here from the user's own images."""
    from cmbench.data.locations import DataLocations

    locations = DataLocations()
    prepared = {path.parent.name for path in locations.data_dir.glob("*/manifest.json")}
    if prepared <= set(registered):
        return []  # and need not import what reads manifests
    from cmbench.data.custom import prepared_here

    specs, problems = prepared_here(registered, locations)
    for problem in problems:
        echo(f"warning: {problem}", err=True)
    return [{**{k: _plain(v) for k, v in s._asdict().items()}, "plugin": ""} for s in specs]


def _plain(value: Any) -> Any:
    """Return a spec's field as JSON has it."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        fields = getattr(value, "_asdict", None)
        return _plain(fields()) if fields else tuple(_plain(v) for v in value)
    return str(value) if isinstance(value, Path) else value


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@json_option
def list_(kind: str, as_json: bool) -> None:
    """List what plugins register; samplers by method."""
    rows = rows_of(kind, load_plugins())
    if as_json:
        echo(json.dumps(rows, indent=1))
        return
    columns = COLUMNS[kind]
    cells = [[_cell(row, column) for column in columns] for row in rows]
    widths = [max([len(c), *(len(line[i]) for line in cells)]) for i, c in enumerate(columns)]
    for line in [[c.upper() for c in columns], *cells]:
        echo("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip())


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column, "")
    if column == "title" and row.get("default"):
        return f"{value} (default)"
    if isinstance(value, float):
        return f"{value:g}"
    joint = "x" if column == "data_shape" else ", "
    return joint.join(map(str, value)) if isinstance(value, tuple) else str(value)
