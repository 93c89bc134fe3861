"""What the table's cells show of a row: their text and what they sort by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin

from cmbench.leaderboard.costs import CostKind, mean_cost
from cmbench.leaderboard.joins import Reported
from cmbench.leaderboard.ranking import Position
from cmbench.leaderboard.rows import MetricSummary, Row
from cmbench.records.record import Record
from cmbench.report.numbers import format_count, format_mean, format_number
from cmbench.report.paths import without_paths

#: A paper's number on arXiv, as references write it.
_ARXIV = re.compile(r"\barXiv:\s?([0-9]{4}\.[0-9]{4,5})\b")
#: A number as sources print them.
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class TableCell:
    """One cell: its text, what it sorts by, whether it is the best of its group, and a link."""

    text: str = ""
    sort: float | str | None = None
    best: bool = False
    link: str = ""


# ---- values of a row ----------------------------------------------------------------------------


def effective_compute(row: Row) -> float | None:
    """Return parameters (billions) × NFE, guidance counted in NFE; None if either is unknown."""
    if row.parameters is None or row.nfe is None:
        return None
    return row.parameters * row.nfe / 1e9


def images_per_s(row: Row) -> float | None:
    """Return the mean sampling speed; None if no record has it."""
    return _mean(row, lambda record: record.sampling.images_per_s)


def images_seen(row: Row) -> float | None:
    """Return the mean number of training images; None for reported rows."""
    return _mean(row, lambda record: float(record.training.images_seen))


def cost_cell(row: Row, kind: CostKind) -> TableCell:
    """Show the mean of a cost; of several hardware, that it has no mean."""
    found = mean_cost(row, kind)
    if found is None:
        several = kind.hardware is not None and any(kind.of(r) is not None for _, r in row.cells)
        return TableCell("several machines" if several else "")
    show = format_count if found[0] >= 1e6 else format_number
    return number_cell(found[0], show)


def _mean(row: Row, value: Callable[[Record], float | None]) -> float | None:
    values = [found for _, record in row.cells if (found := value(record)) is not None]
    return sum(values) / len(values) if values else None


def lookup(record: Record, path: str) -> Any:
    """Return what the dotted ``path`` names in a record; None if it does not exist."""
    found: Any = record
    for part in path.split("."):
        if isinstance(found, Mapping):
            found = found.get(part)
        elif part in getattr(type(found), "model_fields", ()):
            found = getattr(found, part)
        else:
            return None
    return found


def path_problem(path: Any) -> str:
    """Return why a dotted path cannot name anything in a record, or an empty string."""
    if not isinstance(path, str):
        return f"the path {path!r}; allowed: dotted names"
    kinds: list[Any] = [Record]
    for part in path.split("."):
        if Any in kinds:
            return ""
        fields = {n: f.annotation for k in kinds for n, f in getattr(k, "model_fields", {}).items()}
        values = [get_args(kind)[1] for kind in kinds if get_origin(kind) is dict]
        if part not in fields and not values:
            known = ", ".join(sorted(fields)) or "nothing, it is a value"
            return f"the path {path!r}, in which {part!r} does not exist; allowed there: {known}"
        kinds = [a for kind in values or [fields[part]] for a in _alternatives(kind)]
    return ""


def _alternatives(kind: Any) -> list[Any]:
    """Return the members of a union, or the type itself."""
    return [*get_args(kind)] if get_origin(kind) is UnionType else [kind]


# ---- cells --------------------------------------------------------------------------------------


def text_cell(value: str) -> TableCell:
    """Show a text; it sorts without regard to case."""
    return TableCell(value, value.casefold() or None)


def reference_cell(row: Row) -> TableCell:
    """Show the reference; it links to the paper on arXiv where that is known."""
    named = _ARXIV.search(row.reference)
    number = row.arxiv or (named[1] if named else "")
    link = f"https://arxiv.org/abs/{number}" if number else ""
    return TableCell(row.reference, row.reference.casefold() or None, link=link)


def number_cell(value: float | None, show: Callable[[float], str] = format_number) -> TableCell:
    """Show a number, or nothing for None."""
    return TableCell() if value is None else TableCell(show(value), float(value))


def position_cell(found: Position | None) -> TableCell:
    """Show ``1`` or ``2–4``; sorts by the best possible position, then the worst."""
    if found is None:
        return TableCell()
    return TableCell(found.text, found.low + found.high / 1e6)


def nfe_cell(row: Row) -> TableCell:
    """Show the NFE as its source writes it."""
    return TableCell(row.nfe_text, None if row.nfe is None else float(row.nfe))


def measurement_cell(found: MetricSummary | None) -> TableCell:
    """Show ``mean ± half-width``, or the number as its source printed it."""
    return (
        TableCell()
        if found is None
        else TableCell(found.text or format_mean(found.interval), found.mean)
    )


def reported_cell(found: Reported | None) -> TableCell:
    """Show the reported numbers; ``7.85; 7.80`` sorts by the first."""
    if found is None or not found.text:
        return TableCell()
    first = _NUMBER.search(found.text)
    return TableCell(found.text, float(first.group()) if first else None)


def difference_cell(found: Reported | None) -> TableCell:
    """Show measured minus reported, or why there is no difference."""
    if found is None:
        return TableCell()
    if found.difference is None:
        return TableCell(found.withheld)
    return TableCell(f"{found.difference:+.3g}", found.difference)


def samples_cell(row: Row) -> TableCell:
    """Show the images per cell, and whether they are fewer than the protocol's."""
    if row.num_samples is None:
        return TableCell()
    mark = "" if row.full_samples else " (fewer than the protocol's)"
    return TableCell(f"{row.num_samples:,}{mark}", float(row.num_samples))


def record_cell(row: Row, path: str) -> TableCell:
    """Show a field of the row's records: the mean of numbers, otherwise the distinct texts."""
    found = (lookup(record, path) for _, record in row.cells)
    known = [value for value in found if value is not None]
    if known and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known):
        return number_cell(sum(known) / len(known))
    return text_cell(without_paths(", ".join(dict.fromkeys(str(v) for v in known))))
