"""The table's columns: one definition for HTML, Markdown, CSV and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmbench.leaderboard.joins import Reported
from cmbench.leaderboard.ranking import Rank
from cmbench.leaderboard.rows import Measurement, Row
from cmbench.records.record import Record
from cmbench.report.numbers import format_count, format_mean, format_number
from cmbench.report.paths import without_paths

#: A number as sources print them.
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

SortValue = float | str | None


@dataclass(frozen=True)
class Cell:
    """One cell: its text, what it sorts by and whether it is the best of its group."""

    text: str = ""
    sort: SortValue = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column; ``shown`` tells whether it is visible before the reader chooses."""

    key: str
    title: str
    cell: Callable[[Row], Cell]
    numeric: bool = False
    shown: bool = True
    help: str = ""
    metric: str = ""
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Findings:
    """What the rows say together: ranks and reported counterparts, by row id."""

    ranks: Mapping[str, Rank]
    reported: Mapping[str, Reported]


def table_columns(
    rows: Sequence[Row], extra: Mapping[str, str], findings: Findings
) -> list[Column]:
    """Return every column for ``rows``: identity, metrics, cost, provenance, plugins' columns.

    ``extra`` maps titles to dotted paths into the record (hook ``cmbench_report_columns``).
    """
    measured = any(row.cells for row in rows)
    published = any(not row.cells for row in rows)
    columns = [
        Column("method", "Method", lambda r: _text(r.label)),
        Column(
            "rank",
            "Rank",
            lambda r: _rank(findings.ranks.get(r.id)),
            numeric=True,
            shown=any(rank.low is not None for rank in findings.ranks.values()),
            help="among rows of equal NFE and conditioning; 1–3: anywhere from first to third",
        ),
        Column(
            "nfe",
            "NFE",
            _nfe,
            numeric=True,
            help="network evaluations per image, counted by wrapping the network",
        ),
        *_metric_columns(rows),
        Column(
            "reported",
            "Reported",
            lambda r: _reported(findings.reported.get(r.id)),
            numeric=True,
            shown=bool(findings.reported),
            help="what others reported for this method at this NFE",
        ),
        Column(
            "difference",
            "Difference",
            lambda r: _difference(findings.reported.get(r.id)),
            numeric=True,
            shown=bool(findings.reported),
            help="measured minus reported, where the metric keys are equal",
        ),
        Column(
            "reported_under",
            "Reported under",
            lambda r: _under(findings.reported.get(r.id)),
            shown=False,
            help="protocols of the reported numbers with their metric keys",
        ),
        Column(
            "kind",
            "Kind",
            lambda r: _text(r.kind),
            shown=published and measured,
            help="measured by this harness, imported checkpoint, scored samples or reported",
        ),
        Column("family", "Family", lambda r: _text(r.family), shown=published),
        Column(
            "conditional",
            "Labels",
            lambda r: _text(conditioning(r)),
            shown=False,
            help="class-conditional or unconditional",
        ),
        Column(
            "seeds",
            "Seeds",
            _seeds,
            numeric=True,
            shown=measured,
            help="independent seeds behind mean and interval",
        ),
        Column(
            "images_per_s",
            "Images/s",
            lambda r: _mean_of(r, _images_per_s),
            numeric=True,
            shown=measured,
            help="sampling speed on the machine of the record",
        ),
        Column("samples", "Samples", _samples, numeric=True, shown=False, help="images per cell"),
        Column(
            "parameters",
            "Parameters",
            lambda r: _count(r.parameters),
            numeric=True,
            shown=published and any(row.parameters for row in rows),
            help="of the network that is sampled",
        ),
        Column(
            "compute",
            "Compute",
            _compute,
            numeric=True,
            shown=False,
            help="effective sampling compute: parameters in billions × NFE",
        ),
        Column(
            "images_seen",
            "Training images",
            lambda r: _mean_of(r, lambda c: float(c.training.images_seen), format_count),
            numeric=True,
            shown=False,
            help="images seen in training",
        ),
        Column(
            "training_h",
            "Device-hours",
            lambda r: _mean_of(r, _training_hours),
            numeric=True,
            shown=False,
            help="training: wall time × processes; GPU-hours on GPUs",
        ),
        Column("recipe", "Recipe", lambda r: _text(r.recipe), shown=measured),
        Column("sampler", "Sampler", lambda r: _text(r.sampler), shown=measured),
        Column(
            "marks", "Marks", lambda r: _text(", ".join(r.marks)), shown=any(r.marks for r in rows)
        ),
        Column("reference", "Reference", lambda r: _text(r.reference), shown=published),
        Column(
            "source",
            "Read in",
            lambda r: _text(r.details.get("source", "")),
            shown=False,
            help="where a reported number was read",
        ),
        Column(
            "table",
            "Source table",
            lambda r: _text(r.details.get("table", "")),
            shown=False,
            help="table of the source that a reported number stands in",
        ),
        Column(
            "title",
            "Title",
            lambda r: _text(r.title),
            shown=False,
            help="what the method calls itself",
        ),
        Column("year", "Year", lambda r: _count(r.year or None, str), numeric=True, shown=False),
        Column("note", "Note", lambda r: _text(r.note), shown=False),
    ]
    return columns + [_extra_column(title, path) for title, path in extra.items()]


#: Order of the metrics after those that rows are ranked by; others follow by name.
_METRIC_ORDER = ("fid", "is", "precision", "recall", "kid", "kd", "density", "coverage")
#: Metrics that are visible before the reader chooses.
_METRICS_SHOWN = 4


def _metric_columns(rows: Sequence[Row]) -> list[Column]:
    """One column per metric, the rank metrics first, then in the order papers print them."""
    first: dict[str, Measurement] = {}
    ranked = list(dict.fromkeys(row.rank_metric for row in rows if row.rank_metric))
    for row in rows:
        for name, measurement in row.measurements.items():
            first.setdefault(name, measurement)
    known = {name: place for place, name in enumerate(_METRIC_ORDER)}
    others = sorted(set(first) - set(ranked), key=lambda n: (known.get(n, len(known)), n))
    names = [n for n in ranked if n in first] + others
    return [
        Column(
            f"metric:{name}",
            f"{metric_title(name)} {'↑' if first[name].higher_is_better else '↓'}",
            lambda r, n=name: _measured(r.measurements.get(n)),  # type: ignore[misc]
            numeric=True,
            shown=index < _METRICS_SHOWN,
            metric=name,
            higher_is_better=first[name].higher_is_better,
            help=f"{metric_title(name)}: mean and 95 % interval over seeds; "
            f"{'higher' if first[name].higher_is_better else 'lower'} is better",
        )
        for index, name in enumerate(names)
    ]


_TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "is-openai": "IS (OpenAI)",
    "kid": "KID",
    "kd": "KD",
}


def metric_title(name: str) -> str:
    """Return how readers know the metric: ``fid`` is FID, ``precision`` is Precision."""
    if name in _TITLES:
        return _TITLES[name]
    return name[:1].upper() + name[1:] if name.isalpha() else name


def _rank(rank: Rank | None) -> Cell:
    if rank is None or rank.low is None:
        return Cell()
    return Cell(rank.text, rank.low + (rank.high or rank.low) / 1e6)


def _reported(found: Reported | None) -> Cell:
    if found is None or not found.text:
        return Cell()
    first = _NUMBER.search(found.text)  # "7.85; 7.80" sorts by the first
    return Cell(found.text, float(first.group()) if first else None)


def _difference(found: Reported | None) -> Cell:
    if found is None:
        return Cell()
    if found.difference is None:
        return Cell(found.withheld)
    return Cell(f"{found.difference:+.3g}", found.difference)


def _under(found: Reported | None) -> Cell:
    return _text(found.under if found is not None else "")


def _text(value: str) -> Cell:
    return Cell(value, value.casefold() or None)


def _count(value: int | None, show: Callable[[int], str] = format_count) -> Cell:
    return Cell() if value is None else Cell(show(value), float(value))


def conditioning(row: Row) -> str:
    """Return ``conditional``, ``unconditional`` or nothing where the source does not say."""
    if row.conditional is None:
        return ""
    return "conditional" if row.conditional else "unconditional"


def _nfe(row: Row) -> Cell:
    return Cell(row.nfe_text, None if row.nfe is None else float(row.nfe))


def _measured(found: Measurement | None) -> Cell:
    if found is None:
        return Cell()
    return Cell(found.text or format_mean(found.interval), found.mean)


def _seeds(row: Row) -> Cell:
    if not row.cells:
        return Cell()
    return Cell(str(row.seeds), float(row.seeds))


def _samples(row: Row) -> Cell:
    if row.num_samples is None:
        return Cell()
    mark = "" if row.full_samples else " (fewer than the protocol's)"
    return Cell(f"{row.num_samples:,}{mark}", float(row.num_samples))


def effective_compute(row: Row) -> float | None:
    """Return parameters (billions) × NFE, guidance counted in NFE; None if either is unknown."""
    if row.parameters is None or row.nfe is None:
        return None
    return row.parameters * row.nfe / 1e9


def _compute(row: Row) -> Cell:
    value = effective_compute(row)
    return Cell() if value is None else Cell(format_number(value), value)


def _images_per_s(record: Record) -> float | None:
    return record.sampling.images_per_s


def _training_hours(record: Record) -> float | None:
    phases = record.training.seconds_by_phase
    hours = sum(phases.values()) * record.environment.world_size / 3600
    return hours if phases else None


def row_mean(row: Row, value: Callable[[Record], float | None]) -> float | None:
    """Return the mean of a record's value over the row's cells; None if none has it."""
    values = [found for _, record in row.cells if (found := value(record)) is not None]
    return sum(values) / len(values) if values else None


def _mean_of(
    row: Row, value: Callable[[Record], float | None], show: Callable[[float], str] = format_number
) -> Cell:
    mean = row_mean(row, value)
    return Cell() if mean is None else Cell(show(mean), mean)


def training_hours(row: Row) -> float | None:
    """Return the mean training time in device-hours: wall time of all phases × processes."""
    return row_mean(row, _training_hours)


def _extra_column(title: str, path: str) -> Column:
    def cell(row: Row) -> Cell:
        return _joined(lookup(record, path) for _, record in row.cells)

    return Column(f"extra:{title}", title, cell, help=f"record field {path}")


def lookup(record: Record, path: str) -> Any:
    """Return what the dotted ``path`` names in a record; None where it ends early."""
    found: Any = record
    for part in path.split("."):
        if isinstance(found, Mapping):
            found = found.get(part)
        elif part in type(found).model_fields if hasattr(type(found), "model_fields") else False:
            found = getattr(found, part)
        else:
            return None
    return found


def _joined(values: Iterable[Any]) -> Cell:
    """One cell from the seeds' values: the mean of numbers, otherwise the distinct texts."""
    known = [v for v in values if v is not None]
    if not known:
        return Cell()
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known):
        mean = sum(known) / len(known)
        return Cell(format_number(mean), float(mean))
    return _text(without_paths(", ".join(dict.fromkeys(str(v) for v in known))))
