"""``cmbench recipe``: the hyper-parameters, seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.common import echo_table
from cmbench.cli.options import json_option, overrides_option
from cmbench.cli.output import echo
from cmbench.errors import UserError
from cmbench.files import write_atomically
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.sweep.recipes import default_recipe, parse_overrides, recipe_names, require_once

if TYPE_CHECKING:
    from cmbench.sweep.recipe_view import RecipeEntry

Verb = Callable[..., Any]


@click.group()
def recipe() -> None:
    """List, show, compare and export recipes: named hyper-parameters of a method on a dataset.

    RECIPE is DATASET.NAME, or DATASET alone for the one that `cmbench run` takes.
    """


@recipe.command("list")
@click.argument("method")
def list_(method: str) -> None:
    """List the recipes of METHOD."""
    spec = load_plugins().methods.get(method, "cmbench recipe")
    rows = [
        [f"{dataset}.{name}", "default" if name == default_recipe(spec, dataset) else ""]
        for dataset, name in recipe_names(spec)
    ]
    echo_table(["recipe", "of `cmbench run`"], rows, prose=("of `cmbench run`",))


@recipe.command()
@click.argument("method")
@click.argument("recipe_name", metavar="RECIPE")
@overrides_option
@json_option
def show(method: str, recipe_name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show every value of a recipe: where it comes from, its default, the paper's, its meaning."""
    entries = _entries(load_plugins(), method, recipe_name, overrides)
    from cmbench.sweep.recipe_view import shown

    if as_json:
        import json

        echo(json.dumps([vars(entry) for entry in entries], indent=1, default=str))
        return
    columns: dict[str, Callable[[RecipeEntry], str]] = {
        "key": lambda entry: entry.key,
        "value": lambda entry: shown(entry.value),
        "from": lambda entry: entry.origin,
        "default": lambda entry: "required" if entry.required else shown(entry.default),
        "paper": lambda entry: "-" if entry.paper is None else shown(entry.paper),
        "meaning": lambda entry: entry.meaning,
    }
    if all(entry.paper is None for entry in entries):
        del columns["paper"]
    rows = [[show_it(entry) for show_it in columns.values()] for entry in entries]
    echo_table(list(columns), rows, prose=columns)


@recipe.command()
@click.argument("first", metavar="METHOD:RECIPE")
@click.argument("second", metavar="METHOD:RECIPE")
def diff(first: str, second: str) -> None:
    """Show the values in which two recipes differ."""
    plugins = load_plugins()
    found = [_entries(plugins, *_method_of(name), ()) for name in (first, second)]
    from cmbench.sweep.recipe_view import shown

    left, right = ({entry.key: shown(entry.value) for entry in entries} for entries in found)
    rows = [
        [key, left.get(key, "-"), right.get(key, "-")]
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]
    echo_table(["key", first, second], rows, prose=(first, second))


@recipe.command()
@click.argument("method")
@click.argument("recipe_name", metavar="RECIPE")
@click.argument("file", metavar="FILE.toml", type=click.Path(path_type=Path, dir_okay=False))
@overrides_option
@click.option("--force", is_flag=True, help="Replace FILE.")
def export(
    method: str, recipe_name: str, file: Path, overrides: tuple[str, ...], force: bool
) -> None:
    """Write every value of a recipe to FILE.toml, to be changed and run."""
    plugins = load_plugins()
    if file.suffix != ".toml" or (file.exists() and not force):
        raise UserError(
            "cmbench recipe export",
            f"{file} {'exists' if file.exists() else 'is not named FILE.toml'}",
            allowed="a new FILE.toml",
            remedy="name another file" + (", or add --force" if file.exists() else ""),
        )
    dataset, name = _place(plugins, method, recipe_name)
    entries = _entries(plugins, method, f"{dataset}.{name}", overrides)
    from cmbench.sweep.recipe_view import as_toml

    write_atomically(file, as_toml(dataset, name, entries).encode(), "name another file")
    echo(f"{file}: run it with `cmbench run -m {method} -d {dataset} --recipe {file}:{name}`")


def _place(plugins: PluginManager, method: str, text: str) -> tuple[str, str]:
    """Return dataset and name of ``DATASET.NAME`` or ``DATASET``."""
    spec = plugins.methods.get(method, "cmbench recipe")
    known = recipe_names(spec)
    for dataset, name in known:
        if text == f"{dataset}.{name}":
            return dataset, name
    if text in {dataset for dataset, _ in known}:
        return text, default_recipe(spec, text)
    raise UserError(
        f"method {method!r}",
        f"unknown recipe {text!r}",
        allowed=", ".join(f"{dataset}.{name}" for dataset, name in known) or "none",
        remedy=f"see `cmbench recipe list {method}`",
    )


def _entries(
    plugins: PluginManager, method: str, text: str, overrides: tuple[str, ...]
) -> list[RecipeEntry]:
    dataset, name = _place(plugins, method, text)
    require_once(overrides)
    from cmbench.sweep.recipe_view import recipe_entries  # imports torch

    extra = parse_overrides(overrides)
    return recipe_entries(plugins, plugins.methods.get(method), dataset, name, extra)


def _method_of(text: str) -> tuple[str, str]:
    method, colon, name = text.partition(":")
    if not colon:
        raise UserError(
            "cmbench recipe diff", f"{text!r}", allowed="METHOD:DATASET.NAME or METHOD:DATASET"
        )
    return method, name
