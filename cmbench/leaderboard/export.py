"""Rows and cells as flat tables: CSV, Parquet, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cmbench.errors import MissingError, UserError
from cmbench.leaderboard.best_groups import best_groups, bold_values
from cmbench.leaderboard.costs import COSTS, hardware_of, mean_cost
from cmbench.leaderboard.floors import marked_by_floor
from cmbench.leaderboard.ranking import positions
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.leaderboard.sections import sections
from cmbench.records.folders import read_records
from cmbench.records.record import Record


@dataclass
class FlatTable:
    """Lines of one flat table, and the records that could not be read."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Every column in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def _read(folder: Path, dataset: str, table: FlatTable) -> Iterator[tuple[Path, Record]]:
    for path, found in read_records(folder, dataset):
        if isinstance(found, UserError):
            table.errors.append(found)
        else:
            yield path, found


def cell_table(folders: Mapping[str, Path]) -> FlatTable:
    """One line per record, its fields as dotted columns; lists and mappings as JSON text."""
    table = FlatTable()
    for dataset, folder in folders.items():
        for _, record in _read(folder, dataset, table):
            table.rows.append(dict(_flat("", record.model_dump(mode="json"))))
    return table


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    whole = prefix in ("training.config", "environment.packages") or prefix.endswith(".detail")
    if isinstance(value, Mapping) and not whole:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, (Mapping, list)):
        yield prefix, json.dumps(value, sort_keys=True)
    else:
        yield prefix, value


def row_table(folders: Mapping[str, Path]) -> FlatTable:
    """One line per row over seeds: mean, interval and raw values of every metric.

    Also whether the row may be the best of its NFE, and from five seeds on its position.
    """
    table = FlatTable()
    for dataset, folder in folders.items():
        rows = marked_by_floor(aggregate(_read(folder, dataset, table)))
        groups = best_groups(rows)
        placed, bold = positions(groups), bold_values(groups)
        for section in sections(rows):
            for row in section.rows:
                position = placed.get(row.id)
                line = _row(row) | {
                    "section": section.title,
                    "may_be_best": (row.id, row.rank_metric) in bold,
                    "position_low": position.low if position else None,
                    "position_high": position.high if position else None,
                    "p_best": position.p_best if position else None,
                }
                table.rows.append(line | _metrics(row))
    return table


def _row(row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "dataset": row.dataset,
        "kind": row.kind,
        "method": row.method,
        "label": row.label,
        "title": row.title,
        "family": row.family,
        "recipe": row.configuration,
        "sampler": row.sampler,
        "conditional": row.conditional,
        "nfe": row.nfe,
        "seeds": row.seeds,
        "samples": row.num_samples,
        "parameters": row.parameters,
        **{kind.key: found[0] if (found := mean_cost(row, kind)) else None for kind in COSTS},
        "hardware": hardware_of(row),
        "marks": ", ".join((*row.marks, *row.findings)),
        "cells": " ".join(record.cell for _, record in row.cells),
    }


def _metrics(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for name, found in row.measurements.items():
        interval = found.interval
        line |= {
            f"{name}_mean": interval.mean,
            f"{name}_low": interval.low,
            f"{name}_high": interval.high,
            f"{name}_values": " ".join(repr(unit.value) for unit in found.units),
            f"{name}_key": found.key,
        }
    return line


def spreadsheet_safe(cell: Any) -> Any:
    """Return text that a spreadsheet would run as a formula with a leading apostrophe."""
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + cell
    return cell


def to_csv(table: FlatTable) -> bytes:
    """Return the table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(spreadsheet_safe, table.columns))
    for row in table.rows:
        writer.writerow([spreadsheet_safe(row.get(name)) for name in table.columns])
    return buffer.getvalue().encode()


def to_parquet(table: FlatTable) -> bytes:
    """Return the table as Parquet.

    Raises:
        MissingError: if pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise MissingError(
            "export", "parquet needs pyarrow", remedy="pip install 'cmbench[parquet]', or use csv"
        )
    import pandas  # heavy: only for this format

    frame = pandas.DataFrame(table.rows, columns=table.columns)
    for name in frame.columns:
        kinds = {type(row[name]) for row in table.rows if row.get(name) is not None}
        if len(kinds - {int, float}) > 1 or (len(kinds) > 1 and kinds - {int, float}):
            # A Parquet column has one type; recipes of different methods may disagree on it.
            frame[name] = frame[name].map(lambda v: None if v is None else str(v))
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()
