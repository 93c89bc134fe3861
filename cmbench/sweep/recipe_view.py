"""Recipes for people: every value with its default, its origin and its meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import MethodSpec
from cmbench.sweep.planning import network_name, with_network_options
from cmbench.sweep.plans import load_method_class
from cmbench.sweep.recipes import Table, merge, merged, recipe_layers, recipe_names
from cmbench.sweep.validation import owner_of, validate

#: Origin of a value that no recipe states.
DEFAULT = "default"
_NETWORK = "network."


@dataclass(frozen=True)
class RecipeEntry:
    """One value of a resolved recipe.

    ``origin`` is the table of the file that states it, ``-o`` for an override, or ``default``.
    ``required`` says that there is no default. ``paper`` is the value of the method's ``paper``
    recipe for the dataset, None without one.
    """

    key: str
    value: Any
    default: Any
    required: bool
    origin: str
    meaning: str
    paper: Any = None


def recipe_entries(
    plugins: PluginManager,
    spec: MethodSpec,
    dataset: str,
    recipe: str,
    overrides: Mapping[str, Any],
) -> list[RecipeEntry]:
    """Return every value of a recipe in the order of the method's options.

    What a teacher adds when it is found (its network) is not known before, and not shown.

    Raises:
        UserError: the recipe does not exist, or a key or value is wrong.
    """
    layers = [*recipe_layers(spec, dataset, recipe), ("-o", dict(overrides))]
    config, values = _resolved(plugins, spec, f"{dataset}.{recipe}", layers)
    papers: dict[str, Any] = {}
    if recipe != "paper" and (dataset, "paper") in recipe_names(spec):
        paper = recipe_layers(spec, dataset, "paper")
        _, papers = _resolved(plugins, spec, f"{dataset}.paper", paper)
    stated = [(label, dict(flat(table))) for label, table in layers]
    network: Any = plugins.networks.load(network_name(plugins, config.network))
    found = []
    for key, value in values.items():
        inner = key.removeprefix(_NETWORK)
        owner = type(config) if inner == key else network.Config
        default, required, meaning = _field(owner, inner)
        origin = next((label for label, keys in reversed(stated) if key in keys), DEFAULT)
        found.append(RecipeEntry(key, value, default, required, origin, meaning, papers.get(key)))
    return found


def _resolved(
    plugins: PluginManager, spec: MethodSpec, name: str, layers: list[tuple[str, Table]]
) -> tuple[Any, dict[str, Any]]:
    table = merged(layers)
    config = validate(load_method_class(plugins, spec).Config, table, f"recipe {spec.name}/{name}")
    config = with_network_options(plugins, config)
    return config, dict(flat(config.model_dump(mode="json")))


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``optimizer.lr`` and its value of tables within tables; lists are values."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _field(model: type[BaseModel], key: str) -> tuple[Any, bool, str]:
    """Return a field's default, whether it is required instead, and its description."""
    place = tuple(key.split("."))
    owner = owner_of(model, place)
    field = owner.model_fields.get(place[-1]) if owner is not None else None
    if field is None:
        return None, True, "network architecture" if key == "name" else ""
    default = field.get_default(call_default_factory=True)
    required = default is PydanticUndefined
    return None if required else to_jsonable_python(default), required, field.description or ""


def shown(value: Any) -> str:
    """Return a value as ``-o`` takes it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(without_none(value))


def as_toml(dataset: str, name: str, entries: list[RecipeEntry]) -> str:
    """Return a recipe file with every value, for ``--recipe FILE.toml:NAME``."""
    table: Table = {}
    for entry in entries:
        if entry.value is not None:  # TOML has no null: what is left out has its default, none
            inner: Any = entry.value
            for part in reversed(entry.key.split(".")):
                inner = {part: inner}
            table = merge(table, inner)
    return tomli_w.dumps({dataset: {name: without_none(table)}})


def without_none(value: Any) -> Any:
    """Return tables within tables and lists without the keys that have no value."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value
