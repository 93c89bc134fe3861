"""The data inside a page: what the charts, the drawer and the downloads read.

Provenance repeats itself (the same hashes, packages and recipes in every row), so keys are stored
once per page and repeated values once in a string table; 500 rows stay far below 3 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cmbench.bench.record import Record
from cmbench.leaderboard.rows import Row
from cmbench.report.columns import Column, effective_compute, row_mean, training_seconds

#: Shown by other means, or too long for a drawer.
_NOT_PROVENANCE = ("artifacts", "schema_version", "title", "status")


class Interner:
    """Values that repeat are stored once and referred to by index."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, value: Any) -> int:
        """Return the index of ``value``."""
        text = json.dumps(value, sort_keys=True)
        if text not in self._index:
            self._index[text] = len(self.values)
            self.values.append(value)
        return self._index[text]


def script_json(value: Any) -> str:
    """Return JSON that is inert inside ``<script>``: no ``<``, ``>``, ``&``, no line separators."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def row_payload(
    row: Row, columns: Sequence[Column], section: int, pool: Interner
) -> dict[str, Any]:
    """Return one row for the page's JSON."""
    return {
        "id": row.id,
        "section": section,
        "kind": row.kind,
        "family": row.family or "other",
        "conditional": row.conditional,
        "method": row.method,
        "title": row.title,
        "recipe": row.recipe,
        "sampler": row.sampler,
        "nfe": row.nfe,
        "nfe_text": row.nfe_text,
        "parameters": row.parameters,
        "compute": effective_compute(row),
        "images_seen": row_mean(row, lambda r: float(r.training.images_seen)),
        "training_s": training_seconds(row),
        "sort": [column.cell(row).sort for column in columns],
        "metrics": {
            name: [m.mean, m.interval.low, m.interval.high]
            for name, m in row.measurements.items()
        },
        "provenance": provenance(row, pool),
    }


def provenance(row: Row, pool: Interner) -> dict[str, Any]:
    """Return what made the row: values common to all seeds once, the others per seed.

    ``common`` and each entry of ``differs`` are ``[key index, value index]`` pairs into ``pool``.
    """
    flat = [flatten(record, path.name) for path, record in row.cells]
    if not flat:
        pairs = {"reference": row.reference, **row.details, "note": row.note}
        return {"common": [[pool.add(k), pool.add(v)] for k, v in pairs.items() if v], "cells": []}
    keys = list(dict.fromkeys(key for item in flat for key in item))
    common = [
        key for key in keys if all(key in item and item[key] == flat[0][key] for item in flat)
    ]
    shared = set(common)
    return {
        "common": [[pool.add(key), pool.add(flat[0][key])] for key in common],
        "cells": [
            [[pool.add(k), pool.add(v)] for k, v in item.items() if k not in shared]
            for item in flat
        ],
    }


def flatten(record: Record, file: str) -> dict[str, Any]:
    """Return the record as dotted keys; mappings that a reader wants whole stay whole."""
    flat: dict[str, Any] = {"file": file, "record.sha256": record.sha256}

    def walk(prefix: str, value: Any) -> None:
        whole = prefix in ("training.config", "environment.packages") or prefix.endswith(".detail")
        if isinstance(value, Mapping) and not whole:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif value not in ("", None, {}, []):
            flat[prefix] = value

    data = record.model_dump(mode="json", exclude=set(_NOT_PROVENANCE))
    walk("", data)
    return flat
