"""The table's columns: one definition for HTML, Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cmbench.leaderboard.costs import COSTS, CostKind, hardware_of
from cmbench.leaderboard.joins import Reported
from cmbench.leaderboard.ranking import Position
from cmbench.leaderboard.rows import MetricSummary, Row, conditioning
from cmbench.report.cells import (
    TableCell,
    cost_cell,
    difference_cell,
    effective_compute,
    images_per_s,
    images_seen,
    measurement_cell,
    nfe_cell,
    number_cell,
    position_cell,
    record_cell,
    reference_cell,
    reported_cell,
    samples_cell,
    text_cell,
)
from cmbench.report.numbers import format_count

#: Order of the metrics after those that rows are ranked by; others follow by name.
_METRIC_ORDER = ("fid", "is", "precision", "recall", "kid", "kd", "density", "coverage")
#: Metrics that are visible before the reader chooses.
_METRICS_SHOWN = 4
_METRIC_TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "is-openai": "IS (OpenAI)",
    "kid": "KID",
    "kd": "KD",
}


@dataclass(frozen=True)
class Column:
    """One column; ``shown`` says whether it is visible before the reader chooses."""

    key: str
    title: str
    cell: Callable[[Row], TableCell]
    numeric: bool = False
    shown: bool = True
    help: str = ""
    metric: str = ""
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Findings:
    """What the rows say together: positions and reported counterparts, by row id."""

    positions: Mapping[str, Position]
    reported: Mapping[str, Reported]


def table_columns(
    rows: Sequence[Row], extra: Mapping[str, str], findings: Findings
) -> list[Column]:
    """Return every column for ``rows``: identity, metrics, cost, provenance, plugins' columns.

    ``extra`` maps titles to dotted paths into the record (hook ``cmbench_report_columns``).
    """
    return [
        *_identity_columns(findings),
        *_metric_columns(rows),
        *_reported_columns(findings),
        *_kind_columns(rows),
        *_cost_columns(rows),
        *_training_columns(),
        *_provenance_columns(rows),
        *(_extra_column(title, path) for title, path in extra.items()),
    ]


def _identity_columns(findings: Findings) -> list[Column]:
    positions = findings.positions
    return [
        Column("method", "Method", lambda r: text_cell(r.label)),
        Column(
            "position",
            "Position",
            lambda r: position_cell(positions.get(r.id)),
            numeric=True,
            shown=bool(positions),
            help="95 % interval of the place among rows of equal NFE, from five shared seeds on",
        ),
        Column(
            "p_best",
            "P(best)",
            lambda r: number_cell(positions[r.id].p_best if r.id in positions else None),
            numeric=True,
            shown=False,
            help="probability of being the best of its NFE, from five shared seeds on",
        ),
        Column(
            "nfe",
            "NFE",
            nfe_cell,
            numeric=True,
            help="network evaluations per image, counted by wrapping the network",
        ),
    ]


def _metric_columns(rows: Sequence[Row]) -> list[Column]:
    """One column per metric, the rank metrics first, then in the order papers print them."""
    first: dict[str, MetricSummary] = {}
    ranked = list(dict.fromkeys(row.rank_metric for row in rows if row.rank_metric))
    for row in rows:
        for name, measurement in row.measurements.items():
            first.setdefault(name, measurement)
    order = {name: index for index, name in enumerate(_METRIC_ORDER)}
    others = sorted(set(first) - set(ranked), key=lambda n: (order.get(n, len(order)), n))
    names = [n for n in ranked if n in first] + others
    return [
        _metric_column(name, first[name].higher_is_better, index < _METRICS_SHOWN)
        for index, name in enumerate(names)
    ]


def _metric_column(name: str, higher_is_better: bool, shown: bool) -> Column:
    title, better = metric_title(name), "higher" if higher_is_better else "lower"
    return Column(
        f"metric:{name}",
        f"{title} {'↑' if higher_is_better else '↓'}",
        lambda r: measurement_cell(r.measurements.get(name)),
        numeric=True,
        shown=shown,
        metric=name,
        higher_is_better=higher_is_better,
        help=f"{title}: mean and 95 % interval over seeds; {better} is better",
    )


def metric_title(name: str) -> str:
    """Return how readers know the metric: ``fid`` is FID, ``precision`` is Precision."""
    if name in _METRIC_TITLES:
        return _METRIC_TITLES[name]
    return name[:1].upper() + name[1:] if name.isalpha() else name


def _reported_columns(findings: Findings) -> list[Column]:
    reported = findings.reported
    return [
        Column(
            "reported",
            "Reported",
            lambda r: reported_cell(reported.get(r.id)),
            numeric=True,
            shown=bool(reported),
            help="what others reported for this method at this NFE",
        ),
        Column(
            "difference",
            "Difference",
            lambda r: difference_cell(reported.get(r.id)),
            numeric=True,
            shown=bool(reported),
            help="measured minus reported, if the metric keys are equal",
        ),
        Column(
            "reported_under",
            "Reported under",
            lambda r: text_cell(reported[r.id].under if r.id in reported else ""),
            shown=False,
            help="protocols of the reported numbers with their metric keys",
        ),
    ]


def _kind_columns(rows: Sequence[Row]) -> list[Column]:
    published = any(not row.cells for row in rows)
    return [
        Column(
            "kind",
            "Kind",
            lambda r: text_cell(r.kind),
            shown=published and any(row.cells for row in rows),
            help="measured by this harness, reference (shipped with cmbench), imported checkpoint,"
            " scored samples or reported",
        ),
        Column("family", "Family", lambda r: text_cell(r.family), shown=published),
        Column(
            "conditional",
            "Labels",
            lambda r: text_cell(conditioning(r.conditional)),
            shown=False,
            help="class-conditional or unconditional",
        ),
    ]


def _number_column(
    key: str, title: str, cell: Callable[[Row], TableCell], help: str, shown: bool = False
) -> Column:
    return Column(key, title, cell, numeric=True, shown=shown, help=help)


def _cost_columns(rows: Sequence[Row]) -> list[Column]:
    measured = any(row.cells for row in rows)
    parameters = any(row.parameters for row in rows) and not all(row.cells for row in rows)

    return [
        _number_column(
            "seeds",
            "Seeds",
            lambda r: number_cell(r.seeds if r.cells else None, str),
            "independent seeds behind mean and interval",
            measured,
        ),
        _number_column(
            "images_per_s",
            "Images/s",
            lambda r: number_cell(images_per_s(r)),
            "sampling speed on the machine of the record",
            measured,
        ),
        _number_column("samples", "Samples", samples_cell, "images per cell"),
        _number_column(
            "parameters",
            "Parameters",
            lambda r: number_cell(r.parameters, format_count),
            "of the network that is sampled",
            parameters,
        ),
    ]


def _training_columns() -> list[Column]:
    return [
        _number_column(
            "compute",
            "Compute",
            lambda r: number_cell(effective_compute(r)),
            "effective sampling compute: parameters in billions × NFE",
        ),
        _number_column(
            "images_seen",
            "Training images",
            lambda r: number_cell(images_seen(r), format_count),
            "images seen in training",
        ),
        *(_cost_column(kind) for kind in COSTS),
        Column(
            "hardware",
            "Hardware",
            lambda r: text_cell(hardware_of(r)),
            shown=False,
            help="that times and memory belong to",
        ),
    ]


def _cost_column(kind: CostKind) -> Column:
    return _number_column(kind.key, kind.title, lambda r: cost_cell(r, kind), kind.help)


def _provenance_columns(rows: Sequence[Row]) -> list[Column]:
    measured = any(row.cells for row in rows)
    published = any(not row.cells for row in rows)

    def text(
        key: str, title: str, value: Callable[[Row], str], shown: bool = False, help: str = ""
    ) -> Column:
        return Column(key, title, lambda r: text_cell(value(r)), shown=shown, help=help)

    return [
        text("recipe", "Recipe", lambda r: r.configuration, measured),
        text("sampler", "Sampler", lambda r: r.sampler, measured),
        text(
            "marks",
            "Marks",
            lambda r: ", ".join((*r.marks, *r.findings)),
            any(r.marks or r.findings for r in rows),
            "settings that are not the usual ones, and findings: click a row for its warnings",
        ),
        Column("reference", "Reference", reference_cell, shown=published),
        text(
            "source",
            "Read in",
            lambda r: r.details.get("source", ""),
            help="where a reported number was read",
        ),
        text(
            "table",
            "Source table",
            lambda r: r.details.get("table", ""),
            help="table of the source with the reported number",
        ),
        text("title", "Title", lambda r: r.title, help="what the method calls itself"),
        Column(
            "year", "Year", lambda r: number_cell(r.year or None, str), numeric=True, shown=False
        ),
        text("note", "Note", lambda r: r.note),
    ]


def _extra_column(title: str, path: str) -> Column:
    return Column(
        f"extra:{title}", title, lambda r: record_cell(r, path), help=f"record field {path}"
    )
