"""Run files: ``cmbench run sweep.toml`` states in a file what long options state in a command."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from cmbench.cli.options import Parsed, told_once
from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.files import expanded, read_toml, readable, reading
from cmbench.records.options import dotted
from cmbench.sweep.asked import as_options
from cmbench.sweep.recipes import Table, nested

#: Table of a run file with the hyper-parameters that ``-o`` overrides.
_OPTIONS = "options"


@dataclass(frozen=True)
class RunFile:
    """A run file: the hash of its bytes, and its overrides of the recipe as nested tables."""

    sha256: str
    options: Table


def use_run_file(
    context: click.Context, parameter: click.Parameter, given: str | None
) -> RunFile | None:
    """Make the values of a run file the defaults of the command's options; return the file.

    Raises:
        MissingError: the file does not exist.
        UserError: a key is unknown, or a value is not one that the option takes.
    """
    if given is None:
        return None
    who, path = f"run file {readable(given)}", expanded(given)
    with told_once():
        if not path.is_file():
            remedy = "check the path; methods are given by --method"
            raise MissingError(who, "does not exist", allowed="a TOML file", remedy=remedy)
        with reading(who, "correct the file"):
            table, sha256 = read_toml(path), hashlib.sha256(path.read_bytes()).hexdigest()
        options = _options(who, table.pop(_OPTIONS, {}))
        known = {
            name.removeprefix("--"): option
            for option in context.command.params
            if isinstance(option, click.Option) and not option.multiple
            for name in option.opts
            if name.startswith("--")
        }
        defaults: dict[str, Any] = {}
        for key, value in table.items():
            if key not in known:
                raise unknown_name(who, "key", key, {*known, _OPTIONS})
            defaults[str(known[key].name)] = _default(f"{who}, {key}", context, known[key], value)
    context.default_map = defaults
    return RunFile(sha256, options)


def _options(who: str, given: Any) -> Table:
    """Return the table of overrides; ``"none"`` is none, as in ``-o``."""
    if not isinstance(given, Mapping):
        raise UserError(who, f"{_OPTIONS} is {given!r}", allowed=f"a table [{_OPTIONS}]")
    leaves = dict(dotted(as_options(given)))
    for key, value in leaves.items():
        if not isinstance(value, str | int | float | list | Mapping):
            raise UserError(
                f"{who}, {_OPTIONS}.{key}", f"{value}", allowed="a text, number, list or table"
            )
    return nested({key: None if value == "none" else value for key, value in leaves.items()})


def _default(who: str, context: click.Context, option: click.Option, value: Any) -> Any:
    """Return a value of the file as the command line would have it."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise UserError(who, f"{value!r}", allowed="true, false")
        return value
    several = isinstance(value, list) and isinstance(option.type, Parsed)
    members = value if several else [value]
    if not members or not all(_is_plain(one) for one in members):
        allowed = "a text, a number, or a list of them" if several else "a text or a number"
        raise UserError(who, f"{value!r}", allowed=allowed)
    text = ",".join(map(str, members))
    if several and len(members) == 1 and option.name == "seeds":
        text += ","  # [4] is seed 4, and 4 is four seeds
    try:
        option.type_cast_value(context, text)
    except UserError as error:
        raise type(error)(who, error.problem, allowed=error.allowed, remedy=error.remedy) from error
    except click.BadParameter as error:
        raise UserError(
            who, error.message.rstrip("."), remedy="correct the file, see `cmbench run --help`"
        ) from error
    return text


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
