"""Recipes: named sets of hyper-parameters for one method on one dataset.

A method's recipe file is TOML. ``[base]`` has the options that all recipes share, to which
``[<dataset>.<recipe>]`` adds; ``extends = "other"`` starts from another recipe of the same dataset.
A dataset's plugin may bring a file with ``[<method>.<recipe>]`` for methods of other people.
Overrides (``-o key.sub=value``) come last. Imports neither torch nor pydantic: the result is
validated by :mod:`cmbench.sweep.validation`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmbench.errors import UserError, unknown_name
from cmbench.files import read_toml, reading
from cmbench.plugin.specs import MethodSpec
from cmbench.records.options import AnyOf, parse_values

BASE = "base"
#: Recipe names become parts of folder and file names.
_RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")
Table = dict[str, Any]


def read_recipe_file(path: Path) -> Table:
    """Parse a recipe file; raise ``UserError`` naming the file and the place."""
    who, remedy = f"recipe file {path}", "correct the file, or name another with --recipe FILE:NAME"
    with reading(who, remedy):
        tables = read_toml(path)
    for owner, recipes in tables.items():
        _check_tables(who, owner, recipes)
    return tables


def _check_tables(who: str, owner: str, recipes: Any) -> None:
    """Raise unless ``[owner.recipe]`` are tables with names that can be file names."""
    if not isinstance(recipes, dict):
        raise UserError(who, f"{owner!r} is {recipes!r}", allowed=f"[{BASE}] and [DATASET.RECIPE]")
    for name, recipe in recipes.items() if owner != BASE else ():
        if not isinstance(recipe, dict):
            raise UserError(who, f"{owner}.{name} is {recipe!r}", allowed=f"a table [{owner}.NAME]")
        if not _RECIPE_NAME.fullmatch(name):
            raise UserError(
                who, f"recipe name {name!r}", allowed="up to 40 letters, digits and . _ + -"
            )
        if not isinstance(recipe.get("extends", ""), str):
            raise UserError(
                who,
                f"{owner}.{name}: extends is {recipe['extends']!r}",
                allowed="the name of another recipe of the dataset",
            )


def method_tables(spec: MethodSpec) -> Table:
    """Return all recipes of a method: of its own file, and those that datasets bring for it.

    Raises:
        UserError: a file cannot be read, or a dataset brings a recipe that the method has.
    """
    tables = read_recipe_file(spec.recipes) if spec.recipes is not None else {}
    for dataset, file in spec.dataset_recipes:
        brought = read_recipe_file(file)
        for name, recipe in brought.get(spec.name, {}).items():
            if name in tables.get(dataset, {}):
                raise UserError(
                    f"recipe file {file}",
                    f"[{spec.name}.{name}] is a recipe that method {spec.name!r} has for "
                    f"{dataset!r} itself",
                    remedy="give it another name",
                )
            whole = merge(brought.get(BASE, {}), recipe)
            tables = {**tables, dataset: {**tables.get(dataset, {}), name: whole}}
    return tables


def recipe_names(spec: MethodSpec, dataset: str | None = None) -> list[tuple[str, str]]:
    """Return the ``(dataset, recipe)`` pairs that there are for a method."""
    tables = method_tables(spec)
    return [
        (owner, name)
        for owner, recipes in tables.items()
        if owner != BASE and (dataset is None or owner == dataset)
        for name in recipes
    ]


def default_recipe(spec: MethodSpec, dataset: str) -> str:
    """Return ``demo`` if a method has it for the dataset, else ``paper``, else the first."""
    names = [name for _, name in recipe_names(spec, dataset)]
    for preferred in ("demo", "paper"):
        if preferred in names:
            return preferred
    if names:
        return names[0]
    others = sorted({owner for owner, _ in recipe_names(spec)})
    raise UserError(
        f"method {spec.name!r}",
        f"has no recipe for dataset {dataset!r}",
        allowed=", ".join(others) or "none",
        remedy=f"add [{dataset}.NAME] to a recipe file and name it with --recipe FILE:NAME, "
        "or use another dataset's with --recipe DATASET.NAME",
    )


def recipe_table(spec: MethodSpec, dataset: str, recipe: str) -> Table:
    """Return a recipe's merged table, see :func:`recipe_layers`."""
    return merged(recipe_layers(spec, dataset, recipe))


def recipe_layers(spec: MethodSpec, dataset: str, recipe: str) -> list[tuple[str, Table]]:
    """Return the tables that make up a recipe with their names in the file, each over the last.

    ``recipe`` may be ``FILE.toml:NAME`` for a user's file, or, on a dataset without recipes,
    ``DATASET.NAME`` for another dataset's.
    """
    file, colon, name = recipe.rpartition(":")
    if name.endswith(".toml"):
        raise _no_name(recipe, dataset)
    if colon and file.endswith(".toml"):
        tables = merge(method_tables(spec), read_recipe_file(Path(file)))
    else:
        name, tables = recipe, method_tables(spec)
        if not tables:
            raise UserError(
                f"method {spec.name!r}",
                "has no recipe file",
                remedy="give a recipe file with --recipe FILE.toml:NAME",
            )
        other, dot, rest = name.partition(".")
        if dot and dataset not in tables and other in tables:
            dataset, name = other, rest  # a dataset without recipes uses another's
    return _layers(spec, tables, dataset, name, ())


def _no_name(file: str, dataset: str) -> UserError:
    """Return the error for a recipe file given without the name of a recipe in it."""
    tables = read_recipe_file(Path(file))
    held = [
        f"{owner}.{name}" for owner, inside in tables.items() if owner != BASE for name in inside
    ]
    mine = tables.get(dataset, {})
    return UserError(
        "--recipe",
        f"{file!r} names a file, not a recipe in it",
        allowed=f"FILE.toml:NAME; the file has {', '.join(held) or 'no recipe'}",
        remedy=f"give {file}:{next(iter(mine), 'NAME')}",
    )


def sampling_table(spec: MethodSpec, dataset: str, recipe: str | None) -> Table:
    """Return the options for sampling an imported checkpoint.

    Those of ``recipe``, or of ``paper`` if the method has it for the dataset, or those that all of
    the method's recipes share.
    """
    if recipe is not None:
        return recipe_table(spec, dataset, recipe)
    if (dataset, "paper") in recipe_names(spec, dataset):
        return recipe_table(spec, dataset, "paper")
    return dict(method_tables(spec).get(BASE, {}))


def _layers(
    spec: MethodSpec, tables: Table, dataset: str, name: str, seen: tuple[str, ...]
) -> list[tuple[str, Table]]:
    recipes = tables.get(dataset, {})
    if name not in recipes:
        if not recipes:
            default_recipe(spec, dataset)  # raises with the datasets there are
        raise unknown_name(f"method {spec.name!r} on {dataset!r}", "recipe", name, recipes)
    table = dict(recipes[name])
    parent = table.pop("extends", None)
    own = (f"{dataset}.{name}", table)
    if parent is None:
        return [(BASE, tables.get(BASE, {})), own]
    owner, dot, rest = parent.partition(".")
    owner, rest = (owner, rest) if dot else (dataset, parent)
    seen = (*seen, f"{dataset}.{name}")
    if f"{owner}.{rest}" in seen:
        raise UserError(
            f"recipe {dataset}.{name}",
            f"extends itself through {parent!r}",
            remedy="remove one of the extends",
        )
    return [*_layers(spec, tables, owner, rest, seen), own]


def merged(layers: Sequence[tuple[str, Table]]) -> Table:
    """Return the tables of a recipe as one, the last on top."""
    table: Table = {}
    for _, layer in layers:
        table = merge(table, layer)
    return table


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """Return ``base`` with ``over`` merged in, tables key by key.

    A table with another ``name`` (of a network or optimizer) replaces the old one: the options of
    one architecture do not apply to another.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            renamed = "name" in value and value["name"] != old.get("name", value["name"])
            out[key] = dict(value) if renamed else merge(old, value)
        else:
            out[key] = value
    return out


def require_once(pairs: Sequence[str]) -> None:
    """Raise ``UserError`` if an override is given twice."""
    given: dict[str, str] = {}
    for pair in pairs:
        key = pair.partition("=")[0].strip()
        if key in given:
            raise UserError(
                "-o",
                f"{key} is given twice: {given[key]!r} and {pair!r}",
                allowed="each key once",
                remedy="leave one of them out",
            )
        given[key] = pair


def require_unchanged(extra: Mapping[str, Any], fixed: Mapping[str, Any], who: str) -> None:
    """Raise ``UserError`` if an override changes a fixed property of a checkpoint, ``who``."""
    for key, value in fixed.items():
        if value is not None and extra.get(key, value) != value:
            asked, known = (json.dumps(v) for v in (extra[key], value))
            raise UserError(
                f"-o {key}={asked}", f"{who} has {known}", allowed=known, remedy="leave it out"
            )


def parse_overrides(pairs: Sequence[str], *, several: bool = False) -> Table:
    """Turn ``["optimizer.lr=1e-4", …]`` into a table; values are TOML or plain strings.

    With ``several``, ``optimizer.lr=1e-3,3e-3`` is an :class:`AnyOf`; without, it is refused.
    """
    table: Table = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            raise UserError(
                "-o", f"{pair!r} is not key=value", allowed="for example -o optimizer.lr=1e-4"
            )
        value = parse_values(text.strip())
        if isinstance(value, AnyOf) and "" in value.values:
            raise UserError(
                "-o",
                f"{pair!r} has an empty value",
                allowed=f"values with commas between: {key}=1,2",
            )
        if isinstance(value, AnyOf) and not several:
            raise UserError(
                "-o",
                f"{pair!r} has several values, which only `cmbench run` takes",
                allowed="one value",
                remedy=f"give one; write a list as {key}=[1,2], and a text with a comma in quotes",
            )
        table = merge(table, nested({key: value}))
    return table


def nested(options: Mapping[str, Any]) -> Table:
    """Return ``{"optimizer.lr": 1e-4}`` as tables within tables."""
    table: Table = {}
    for key, value in options.items():
        inner = value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        table = merge(table, inner)
    return table
