"""The data inside a page: what the charts, the drawer and the downloads read.

Provenance repeats itself (the same hashes, packages and recipes in every row), so keys and values
are stored once per page and referred to by index; 500 rows stay far below 3 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmbench.leaderboard.costs import CostChart
from cmbench.leaderboard.joins import Reported, protocol_text
from cmbench.leaderboard.rows import Row
from cmbench.leaderboard.sections import key_difference
from cmbench.records.record import Record
from cmbench.report.cells import effective_compute, images_seen
from cmbench.report.columns import metric_title
from cmbench.report.page import Line, Page, source_tables
from cmbench.report.paths import clean, without_paths

#: Shown by other means, or too long for a drawer.
_NOT_PROVENANCE = {"artifacts", "schema_version", "status"}
#: Mappings that a reader wants whole.
_WHOLE = ("training.config", "environment.packages", "sampling.tuned")


class Interner:
    """Values that repeat are stored once and referred to by index."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._index: dict[Any, int] = {}

    def add(self, value: Any) -> int:
        """Return the index of ``value``."""
        plain = isinstance(value, (str, int, float, bool))
        key = (type(value), value) if plain else json.dumps(value, sort_keys=True)
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.values)
            self.values.append(value)
        return found


def script_json(value: Any) -> str:
    """Return JSON that is inert inside ``<script>``: no ``<``, ``>``, ``&``, no line separators."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_payload(page: Page, tables: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON inside the page.

    ``tables`` holds the rendered CSV and LaTeX, so that downloads of a selection are lines of what
    the files beside the page hold.
    """
    pool = Interner()
    rows = [
        row_payload(line, page, position, pool)
        for position, section in enumerate(page.sections)
        for line in section.lines
    ]
    metrics = {c.metric: c.higher_is_better for c in page.columns if c.metric}
    return {
        "dataset": page.dataset,
        "rank_metric": page.rank_metric,
        "metrics": [
            {"name": name, "title": metric_title(name), "higher": higher}
            for name, higher in metrics.items()
        ],
        "floors": [
            {"value": _short(floor.value), "label": f"{floor.name}: {floor.short}"}
            for floor in page.floors
        ],
        "columns": [
            {"key": c.key, "title": c.title, "numeric": c.numeric, "shown": c.shown}
            for c in page.columns
        ],
        "filters": {item.key: item.values for item in page.filters},
        "sections": [s.section.title for s in page.sections],
        "ranked": [s.section.ranked for s in page.sections],
        "rows": rows,
        "pool": pool.values,
        "curves": [
            {"row": c.row, "run": c.run, "name": c.name, "nimg": c.nimg, "scalars": c.scalars}
            for c in page.gallery.curves
        ],
        "costs": [cost_payload(chart, page.costs) for chart in page.costs],
        "csv": tables["csv"],
        "latex": tables["tex"],
    }


def cost_payload(chart: CostChart, charts: Sequence[CostChart]) -> dict[str, Any]:
    """Return one chart of quality against a cost: only points of one hardware and metric key.

    Its name tells it from the other ``charts``: the cost, its hardware, and of the metric key what
    the others' have not.
    """
    of = f" on {chart.hardware}" if chart.hardware else ""
    keys = list(dict.fromkeys(other.metric_key for other in charts))
    under = f" ({key_difference(chart.metric_key, keys)})" if len(keys) > 1 else ""
    return {
        "name": f"{chart.kind.title}{of}{under}",
        "key": chart.kind.key,
        "title": chart.kind.title,
        "help": chart.kind.help,
        "hardware": chart.hardware,
        "metric_key": chart.metric_key,
        "points": [[name, _short(cost), _short(value)] for name, cost, value in chart.points],
        "front": list(chart.front),
    }


def row_payload(line: Line, page: Page, section: int, pool: Interner) -> dict[str, Any]:
    """Return one row of the page's section number ``section`` for the page's JSON."""
    row = line.row
    label, reported = page.labels[row.id], page.reported.get(row.id)
    series = [
        label,
        row.series,
        row.conditional,
        row.kind,
        section,
        row.details.get("table", ""),
        list(row.marks),
    ]
    return {
        "id": row.id,
        "section": section,
        "kind": row.kind,
        "family": row.family or "other",
        "table": source_tables(row),
        "conditional": row.conditional,
        "method": row.method,
        "words": f"{row.title} {row.reference} {row.note}",
        "year": row.year or None,
        "sampler": row.sampler,
        "label": page.short_labels[row.id],
        "series": pool.add(series),
        "nfe": row.nfe,
        "nfe_text": row.nfe_text,
        "parameters": row.parameters,
        "compute": _short(effective_compute(row)),
        "images_seen": images_seen(row),
        "sort": [_short(cell.sort) for cell in line.cells],
        "metrics": {
            name: [_short(x) for x in (m.mean, m.interval.low, m.interval.high)]
            for name, m in row.measurements.items()
        },
        "provenance": provenance(row, pool),
        "reported": beside(reported, pool) if reported is not None else [],
    }


def beside(reported: Reported, pool: Interner) -> list[int]:
    """Return what the drawer says about the reported numbers: key and value indices into ``pool``.

    Both metric keys are spelled out, so that a reader sees why there is or is not a difference.
    """
    pairs: list[tuple[str, Any]] = [
        (
            "difference",
            reported.withheld
            if reported.difference is None
            else float(f"{reported.difference:.6g}"),
        ),
        (f"metric key of {reported.metric} here", reported.key or "none"),
    ]
    for row in reported.rows:
        found = row.measurements.get(reported.metric)
        known = (row.label, row.reference, row.details.get("source"), row.details.get("place"))
        said = f"{found.text if found is not None else 'no value'}; {protocol_text(row)}"
        pairs.append((", ".join(part for part in known if part), said))
    return [pool.add(x) for pair in pairs for x in pair]


def public_row(row: Row, label: str) -> dict[str, Any]:
    """Return a row as plugins see it (hook ``cmbench_report_charts``)."""
    return {
        "id": row.id,
        "label": label,
        "dataset": row.dataset,
        "kind": row.kind,
        "method": row.method,
        "title": row.title,
        "family": row.family,
        "recipe": row.recipe,
        "sampler": row.sampler,
        "conditional": row.conditional,
        "nfe": row.nfe,
        "parameters": row.parameters,
        "metrics": {
            name: {
                "mean": m.mean,
                "low": m.interval.low,
                "high": m.interval.high,
                "values": [unit.value for unit in m.units],
                "key": m.key,
                "higher_is_better": m.higher_is_better,
            }
            for name, m in row.measurements.items()
        },
        "cells": [record.cell for _, record in row.cells],
    }


def provenance(row: Row, pool: Interner) -> dict[str, Any]:
    """Return what made the row: values common to all seeds once, the others per seed.

    ``common`` and each entry of ``cells`` alternate key and value indices into ``pool``.
    """
    flat = [flatten(record, path) for path, record in row.cells]
    if not flat:
        pairs = {"reference": row.reference, **row.details, "note": row.note}
        return {
            "common": [pool.add(x) for pair in pairs.items() if pair[1] for x in pair],
            "cells": [],
        }
    first, *others = flat
    common = {key for key, value in first.items() if all(o.get(key, flat) == value for o in others)}
    return {
        "common": [pool.add(x) for key in first if key in common for x in (key, first[key])],
        "cells": [
            [pool.add(x) for pair in item.items() if pair[0] not in common for x in pair]
            for item in flat
        ],
    }


def flatten(record: Record, path: Path) -> dict[str, Any]:
    """Return the record as dotted keys; mappings that a reader wants whole stay whole."""
    flat: dict[str, Any] = {"file": path.name, "sha256": _sha256(record, path)}

    def walk(prefix: str, value: Any) -> None:
        whole = prefix in _WHOLE or prefix.endswith(".detail")
        if isinstance(value, dict) and not whole:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif value not in ("", None, {}, []):
            flat[without_paths(prefix)] = clean(value)

    walk("", record.model_dump(mode="json", exclude=_NOT_PROVENANCE))
    return flat


def _sha256(record: Record, path: Path) -> str:
    # Records are stored in their canonical form, and hashing the file is ten times faster.
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return record.sha256


def _short(value: Any) -> Any:
    """Return a number with the digits that charts and sorting need; the drawer has them all."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
