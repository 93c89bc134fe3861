"""Selecting rows by name: ``METHOD[:RECIPE[:SAMPLER]]`` with options in brackets, or a row id."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cmbench.errors import UserError
from cmbench.leaderboard.facts import configuration_facts, telling_apart, value_facts
from cmbench.leaderboard.rows import REPORTED, Row
from cmbench.records.options import parse_value

_SELECTOR = re.compile(r"([^\[\]]*)(?:\[(.*)\])?")
_FORMS = "METHOD, METHOD:RECIPE, METHOD:RECIPE:SAMPLER, each also with [key=value,...]; or a row id"

#: Dataset, NFE and conditioning: rows of one setting can be compared.
Setting = tuple[str, int | None, bool | None]


def setting_of(row: Row) -> Setting:
    """Return the setting of a row."""
    return row.dataset, row.nfe, row.conditional


def select(rows: Iterable[Row], selector: str) -> list[Row]:
    """Return the measured rows that ``METHOD[:RECIPE[:SAMPLER]]`` or a row id selects.

    ``M:demo[optimizer.lr=1e-2]`` selects those of which the option has this value; several are
    separated by commas. Values are compared as values: 1e-2 is 0.01. Beside the options of the
    recipe there are those of sampling: ``sigmas``, ``ema``, ``dtype``, ``samples``.

    Of the rows of one recipe at one setting, one that differs from the recipe only in what is asked
    for comes before those that differ in more. ``M:demo[]`` selects those that do not differ.

    Raises:
        UserError: there is none; the message lists what there is.
    """
    measured = [row for row in rows if row.kind != REPORTED]
    found = [row for row in measured if row.label == selector]
    found += [row for row in measured if len(selector) >= 6 and row.id.startswith(selector)]
    match = _SELECTOR.fullmatch(selector)
    if found or match is None:
        return _plainest(found, {}) or _none(measured, selector)
    parts = match[1].split(":")
    named = [row for row in measured if _names(row)[: len(parts)] == parts]
    asked = _options(match[2]) if match[2] else {}
    found = [row for row in named if _has(row, asked) and not (match[2] == "" and _changes(row))]
    return _plainest(found, asked) or _none(named or measured, selector)


def _plainest(rows: Sequence[Row], asked: Mapping[str, Any]) -> list[Row]:
    """Return the rows without those that differ in more than what is asked for, if any do not."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((setting_of(row), row.method, row.recipe), []).append(row)
    wanted = {key.removeprefix("recipe.") for key in asked}
    left_out: set[str] = set()
    for members in groups.values():
        more = {row.id for row in members if _changes(row) - wanted}
        left_out |= more if len(more) < len(members) else set()
    return [row for row in rows if row.id not in left_out]


def _changes(row: Row) -> set[str]:
    """Return the names of what the user changed: options of the recipe, and how it was sampled."""
    record = row.cells[0][1]
    sampling = record.sampling
    tuned = {"sigmas"} if sampling.tuned is not None else set()
    dtype = {"dtype"} if sampling.dtype != "float32" else set()
    return {*(record.training.overrides or {}), *(sampling.overrides or {}), *tuned, *dtype}


def selectors(rows: Sequence[Row]) -> list[str]:
    """Return for each row a selector that selects none of the others."""
    samplers = {row.sampler for row in rows}
    names = [":".join(_names(row)[: 2 if len(samplers) == 1 else 3]) for row in rows]
    texts = dict(enumerate(names))
    for name in {name for name in names if names.count(name) > 1}:
        places = [place for place, other in enumerate(names) if other == name]
        told = telling_apart([_facts(rows[place]) for place in places])
        texts |= {place: f"{name}[{','.join(facts)}]" for place, facts in zip(places, told)}
    return [texts[i] if _matches(rows, texts[i]) == [row] else row.id for i, row in enumerate(rows)]


def _matches(rows: Sequence[Row], selector: str) -> list[Row]:
    try:
        return select(rows, selector)
    except UserError:
        return []


def _none(rows: Sequence[Row], selector: str) -> list[Row]:
    known = sorted({":".join(_names(row)[:2]) for row in rows})
    raise UserError(
        "compare",
        f"no measured rows match {selector!r}",
        allowed=", ".join(known) or "none",
        remedy=f"give {_FORMS}",
    )


def _names(row: Row) -> list[str]:
    return [row.method, row.recipe.rpartition(":")[2], row.sampler]


def _facts(row: Row) -> dict[str, Any]:
    """Return what a selector can ask of a row."""
    record = row.cells[0][1]
    return configuration_facts(record) | value_facts(record)


def _options(text: str) -> dict[str, Any]:
    """Return ``key=value,...`` as values; a part without ``=`` belongs to the list before it."""
    found: dict[str, str] = {}
    key = ""
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if equals:
            key = name.strip()
            found[key] = value.strip()
        elif key:
            found[key] += f",{part.strip()}"
    if not found:
        raise UserError("compare", f"[{text}] is not [key=value]", allowed="[optimizer.lr=1e-2]")
    return {
        key: parse_value(f"[{value}]" if "," in value and value[:1] not in "[{" else value)
        for key, value in found.items()
    }


def _has(row: Row, asked: dict[str, Any]) -> bool:
    facts = _facts(row)
    return all(key in facts and _equal(facts[key], value) for key, value in asked.items())


def _equal(own: Any, asked: Any) -> bool:
    """Compare values: numbers as numbers, lists part by part, text as it is written."""
    if isinstance(own, list | tuple):
        parts = asked if isinstance(asked, list) else [asked]
        return len(own) == len(parts) and all(map(_equal, own, parts))
    if _is_number(own) and _is_number(asked):
        return float(own) == float(asked)
    return (type(own) is type(asked) and bool(own == asked)) or str(own) == str(asked)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
