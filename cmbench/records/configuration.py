"""What sets the configuration of one record apart, in words: the same on pages and terminals."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cmbench.records.record import Record

#: Longer values are cut in labels; the record has them in full.
_LONGEST = 60


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested tables as ``("optimizer.lr", 0.01)``."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_value(text: str) -> Any:
    """Return ``text`` as a TOML value, or as a plain string if it is not TOML."""
    if text in ("null", "none", "None"):
        return None
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def value_text(value: Any) -> str:
    """Return a value of a recipe for people: ``0.01``, ``80,0.8``, ``none``."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if float(f"{value:.6g}") == value else repr(value)
    if isinstance(value, list | tuple):
        return ",".join(map(value_text, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key}={value_text(inner)}" for key, inner in value.items())
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def pair_text(pairs: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Return ``("optimizer.lr=0.01",)`` for dotted keys and values."""
    return tuple(f"{key}={value_text(value)}" for key, value in pairs)


def overrides_text(record: Record) -> tuple[str, ...]:
    """Return what differs from the recipe: ``("optimizer.lr=0.01",)``."""
    return pair_text(sorted((record.training.overrides or {}).items()))


def sampling_marks(record: Record) -> tuple[str, ...]:
    """Return how the samples were made otherwise than usual: ``("sigmas 80,0.8", "bfloat16")``.

    A sampler that the user chose is not among them: tables have a column for it.
    """
    sampling = record.sampling
    given = {k: v for k, v in sorted((sampling.overrides or {}).items()) if k != "sampler"}
    marks = [f"{key} {value_text(value)}" for key, value in given.items()]
    if sampling.tuned is not None:
        marks.append("tuned sigmas")
    if sampling.dtype != "float32":
        marks.append(sampling.dtype)
    return tuple(marks)


def configured_method(record: Record) -> str:
    """Return the method with what differs from its recipe: ``M +lr=0.01, sigmas 80,0.8``."""
    method = " ".join([record.method, *(f"+{text}" for text in overrides_text(record))])
    sampler = (record.sampling.overrides or {}).get("sampler")
    return ", ".join([method, *([str(sampler)] if sampler else []), *sampling_marks(record)])
