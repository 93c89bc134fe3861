"""The table as CSV: plain numbers at full precision, one line per row, with the raw values."""

from __future__ import annotations

from collections.abc import Sequence

from cmbench.leaderboard.rows import Row
from cmbench.report.cells import TableCell
from cmbench.report.columns import Column

_METRIC_PARTS = ("mean", "low", "high", "seeds", "values")
#: Numeric columns whose text says more than what they sort by: ``63x2``, ``7.85; 7.80``.
_AS_PRINTED = ("nfe", "reported")


def csv_header(columns: Sequence[Column]) -> list[str]:
    """Return the names of the CSV's columns; a metric has mean, low, high, seeds and values."""
    names = ["id", "section"]
    for column in columns:
        if column.metric:
            names += [f"{column.metric}_{part}" for part in _METRIC_PARTS]
        else:
            names.append(column.key.removeprefix("extra:"))
    return names


def csv_cells(
    row: Row, section: str, cells: Sequence[TableCell], columns: Sequence[Column]
) -> list[object]:
    """Return the values of one row in the order of :func:`csv_header`."""
    values: list[object] = [row.id, section]
    for column, cell in zip(columns, cells, strict=True):
        if column.metric:
            values += _metric_values(row, column.metric)
        elif column.numeric and isinstance(cell.sort, float):
            values.append(cell.text if column.key in _AS_PRINTED else cell.sort)
        else:
            values.append(cell.text)
    return values


def _metric_values(row: Row, name: str) -> list[object]:
    found = row.measurements.get(name)
    if found is None:
        return [None] * len(_METRIC_PARTS)
    interval = found.interval
    raw = " ".join(repr(unit.value) for unit in found.units)
    return [interval.mean, interval.low, interval.high, interval.seeds or None, raw]
