"""Rows: the seeds of one setting together.

Records that agree in everything that decides the number, except the seeds, form one row; a row
keeps every raw value. Published numbers become rows of kind ``reported``. A row's name says what
differs from the recipe, so that no two rows look alike (:mod:`cmbench.leaderboard.labels`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cmbench.leaderboard.facts import (
    configuration_facts,
    held_out_sha256,
    telling_apart,
    value_facts,
)
from cmbench.leaderboard.statistics import Interval, Unit, interval_over_seeds
from cmbench.records.configuration import overrides_text, sampling_marks
from cmbench.records.record import MetricRecord, Record

REPORTED = "reported"
#: Kind of the rows of a board's reference records on a page of other records.
REFERENCE = "reference"
#: The finding that keeps a row from being ranked.
COPIES = "copies of real images"


@dataclass(frozen=True)
class MetricSummary:
    """One metric of a row: mean, interval over seeds and raw values."""

    name: str
    key: str
    higher_is_better: bool
    interval: Interval
    units: tuple[Unit, ...]
    #: As the source printed it (``13.0``), for reported values.
    text: str = ""

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return self.interval.mean


@dataclass(frozen=True)
class Row:
    """One line of a leaderboard."""

    id: str
    dataset: str
    kind: str
    method: str
    title: str
    #: As the user called the samples, where that is not a method's name.
    name: str = ""
    family: str = ""
    reference: str = ""
    #: Number of the paper on arXiv, of reported rows: ``2303.01469``
    arxiv: str = ""
    year: int = 0
    conditional: bool | None = None
    recipe: str = ""
    #: What differs from the recipe: ``("optimizer.lr=0.01",)``.
    overrides: tuple[str, ...] = ()
    #: What tells the row from others that look the same otherwise, as ``overrides``.
    apart: tuple[str, ...] = ()
    sampler: str = ""
    #: Whether the user chose the sampler.
    own_sampler: bool = False
    #: of the passes that sampled; reported rows do not say
    dtype: str = "float32"
    nfe: int | None = None
    #: ``63x2`` if guidance doubles the evaluations.
    nfe_text: str = ""
    parameters: int | None = None
    num_samples: int | None = None
    protocol_samples: int | None = None
    rank_metric: str = ""
    measurements: Mapping[str, MetricSummary] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    #: What a reader should know before trusting the number: ``warnings``, ``copies of real images``
    findings: tuple[str, ...] = ()
    note: str = ""
    #: Title and reason of the protocol a reported row was measured under.
    protocol: tuple[str, str] = ("", "")
    #: What else is known about a reported row: place, table, protocol.
    details: Mapping[str, str] = field(default_factory=dict)
    #: Titles of the tables that print a reported row.
    tables: tuple[str, ...] = ()
    #: The cells of a measured row, in seed order, each with the file it was read from.
    cells: tuple[tuple[Path, Record], ...] = ()

    @property
    def label(self) -> str:
        """The name in tables and charts: as printed by the source, as given, or the method's."""
        return self.title if self.kind == REPORTED else self.name or self.method

    @property
    def configuration(self) -> str:
        """The recipe with what differs from it: ``smoke +optimizer.lr=0.01``."""
        told = [f"[{', '.join(self.apart)}]"] if self.apart else []
        changed = [f"+{text}" for text in self.overrides]
        return " ".join([*([self.recipe] if self.recipe else []), *changed, *told])

    @property
    def series(self) -> str:
        """Equal for the rows of one configuration that differ by NFE; empty for reported rows."""
        if not self.cells:
            return ""
        own = configuration_facts(self.cells[0][1])
        return hashlib.sha256(json.dumps([own, self.apart, self.marks]).encode()).hexdigest()[:12]

    @property
    def rank_measurement(self) -> MetricSummary | None:
        """The measurement that leaderboards rank by, if it was computed."""
        return self.measurements.get(self.rank_metric)

    @property
    def seeds(self) -> int:
        """Independent seeds behind the rank metric; 0 for reported rows."""
        found = self.rank_measurement
        return found.interval.seeds if found is not None and self.cells else 0

    @property
    def full_samples(self) -> bool:
        """Whether every cell has at least the samples that the protocol asks for."""
        if self.num_samples is None or self.protocol_samples is None:
            return True
        return self.num_samples >= self.protocol_samples


def conditioning(conditional: bool | None) -> str:
    """Return ``conditional``, ``unconditional`` or nothing if the source does not say."""
    if conditional is None:
        return ""
    return "conditional" if conditional else "unconditional"


def setting(record: Record) -> dict[str, Any]:
    """Return everything of ``record`` that decides its numbers except the seeds."""
    training, sampling, dataset = record.training, record.sampling, record.dataset
    held_out = held_out_sha256(record)
    return {
        "kind": record.kind,
        "method": record.method,
        "plugin": [record.plugin.distribution, record.plugin.version],
        "conditional": record.conditional,
        "recipe": training.recipe,
        "config": training.config_sha256,
        "ema": training.ema,
        "parameters": training.parameters,
        "images_seen": training.images_seen,
        "nfe": sampling.nfe,
        "sampler": sampling.sampler,
        "times": sampling.sigmas,  # the name that row ids in links were made with
        "tuned": sampling.tuned is not None,
        "num_samples": sampling.num_samples,
        "dtype": sampling.dtype,
        "quantize": sampling.quantize,
        "labels": sampling.labels,
        "dataset": [dataset.name, dataset.revision, dataset.sha256],
        "reference": [dataset.reference_count, dataset.reference_sha256],
        "extractor": [dataset.extractor, dataset.extractor_sha256],
        "rank_metric": record.rank_metric,
        "metric_keys": {name: metric.key for name, metric in sorted(record.metrics.items())},
        **({"held_out": held_out} if held_out else {}),
    }


def setting_id(record: Record) -> str:
    """Return the 12-digit hash of :func:`setting`: equal for the seeds of one row."""
    text = json.dumps(setting(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def aggregate(cells: Iterable[tuple[Path, Record]]) -> list[Row]:
    """Group finished records into rows, ordered by method, recipe, sampler, conditioning, NFE.

    Records that are not finished are ignored (see :func:`unfinished`).
    """
    groups: dict[str, list[tuple[Path, Record]]] = {}
    for path, record in cells:
        if record.status == "finished":
            groups.setdefault(setting_id(record), []).append((path, record))
    rows = [_row(identity, members) for identity, members in groups.items()]
    return sorted(_told_apart(rows), key=row_order)


def reference_rows(
    shipped: Iterable[tuple[Path, Record]], own: Iterable[tuple[Path, Record]]
) -> list[Row]:
    """Return the rows of a board's reference records for a page of the user's ``own`` records.

    They are of kind ``reference`` and have ids of their own, so their seeds never count as the
    user's. Rows whose records the user holds unchanged are left out: they would stand there twice.
    """
    held = {record.cell: record for _, record in own}
    return [
        replace(row, kind=REFERENCE, id=f"{REFERENCE}-{row.id}")
        for row in aggregate(shipped)
        if not all(held.get(record.cell) == record for _, record in row.cells)
    ]


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with what tells those apart that would look alike.

    First configurations of one name, whatever their NFE; then rows of one configuration that
    compare with each other (equal NFE and key of the rank metric).
    """

    def name(row: Row) -> tuple[Any, ...]:
        shown = (row.dataset, row.kind, row.method, row.recipe.rpartition(":")[2], row.overrides)
        return (*shown, row.sampler, row.conditional, row.marks, row.apart)

    def compared(row: Row) -> tuple[Any, ...]:
        found = row.rank_measurement
        return (*name(row), row.nfe, found.key if found else row.num_samples)

    for key, facts in ((name, configuration_facts), (compared, value_facts)):
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(key(row), []).append(row)
        rows = [
            replace(row, apart=row.apart + told)
            for members in groups.values()
            for row, told in zip(members, telling_apart([facts(m.cells[0][1]) for m in members]))
        ]
    return list(rows)


def row_order(row: Row) -> tuple[Any, ...]:
    """Sort key of rows: method, recipe with what differs, sampler, conditioning, NFE, identity."""
    recipe = (row.recipe, row.overrides, row.apart)
    return (row.method, *recipe, row.sampler, bool(row.conditional), row.nfe or 0, row.id)


def unfinished(cells: Iterable[tuple[Path, Record]]) -> list[tuple[Path, Record]]:
    """Return the failed and skipped records in the order given."""
    return [(path, record) for path, record in cells if record.status != "finished"]


def _row(identity: str, members: Sequence[tuple[Path, Record]]) -> Row:
    members = sorted(members, key=lambda m: (m[1].training.seed, m[1].sampling.seed, m[1].cell))
    first = members[0][1]
    measurements = {}
    for name, metric in first.metrics.items():
        measurement = _measurement(name, metric, [record for _, record in members])
        if measurement is not None:
            measurements[name] = measurement
    return Row(
        id=identity,
        dataset=first.dataset.name,
        kind=first.kind,
        method=first.method,
        title=first.title or first.method,
        name=first.label,
        family=first.family,
        reference=first.reference,
        year=first.year,
        conditional=first.conditional,
        recipe=first.training.recipe,
        overrides=next((o for _, record in members if (o := overrides_text(record))), ()),
        sampler=first.sampling.sampler,
        own_sampler="sampler" in (first.sampling.overrides or {}),
        dtype=first.sampling.dtype,
        # 0 stands for scored samples whose cost is not stated.
        nfe=first.sampling.nfe or None,
        nfe_text=str(first.sampling.nfe or "not stated"),
        parameters=first.training.parameters or None,
        num_samples=min(record.sampling.num_samples for _, record in members),
        protocol_samples=max(record.sampling.protocol_samples for _, record in members),
        rank_metric=first.rank_metric,
        measurements=measurements,
        marks=sampling_marks(first),
        findings=_findings([record for _, record in members]),
        cells=tuple(members),
    )


def _findings(records: Sequence[Record]) -> tuple[str, ...]:
    """Return what is odd about the samples of a row."""
    copies = any(count.significant for record in records for count in record.copies.values())
    warned = any(record.warnings for record in records)
    return ((COPIES,) if copies else ()) + (("warnings",) if warned else ())


def _measurement(
    name: str, metric: MetricRecord, records: Sequence[Record]
) -> MetricSummary | None:
    units = tuple(
        Unit(record.training.seed, record.sampling.seed, found.value, found.standard_error)
        for record in records
        if (found := record.metrics[name]).value is not None
    )
    if not units:
        return None
    return MetricSummary(
        name, metric.key, metric.higher_is_better, interval_over_seeds(units), units
    )
