"""Options of recipes as text: dotted keys and values, read and written. Imports no pydantic."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Longer values are cut in labels; the record has them in full.
_LONGEST = 60
#: More options than these are counted.
_MOST = 8


@dataclass(frozen=True)
class AnyOf:
    """Several values of one option: a sweep makes runs of each."""

    values: tuple[Any, ...]


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


def parse_values(text: str) -> Any:
    """Return ``1e-3,3e-3`` as :class:`AnyOf`, each value once, and anything else as one value.

    A comma within brackets, braces, parentheses or quotes separates no values.
    """
    parts = _split(text)
    if len(parts) == 1:
        return parse_value(text)
    return AnyOf(tuple(parse_value(part) for part in dict.fromkeys(parts)))


def _split(text: str) -> list[str]:
    """Split a text at its outer commas."""
    parts, depth, quote, before = [""], 0, "", ""
    for character in text:
        if quote:
            escaped = quote == '"' and before == "\\"
            quote = "" if character == quote and not escaped else quote
            before = "" if escaped else character
        elif character in "\"'":
            quote, before = character, ""
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]


def value_text(value: Any) -> str:
    """Return a value of a recipe for people: ``0.01``, ``80,0.8``, ``none``."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if float(f"{value:.6g}") == value else repr(value)
    if isinstance(value, list | tuple):
        return clipped(",".join(map(value_text, value)))
    if isinstance(value, Mapping):
        return clipped(" ".join(f"{key}={value_text(inner)}" for key, inner in value.items()))
    return clipped(str(value))


def clipped(text: str) -> str:
    """Return a text of a label, cut if it is long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def pair_text(pairs: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Return ``("optimizer.lr=0.01",)`` for dotted keys and values; the first few of many."""
    texts = [f"{clipped(key)}={value_text(value)}" for key, value in pairs]
    more = [f"{len(texts) - _MOST} more"] if len(texts) > _MOST else []
    return tuple(texts[:_MOST] + more)
