"""Rows: the seeds of one setting together.

Records that agree in everything that decides the number, except the seeds, form one row; a row
keeps every raw value. Published numbers become rows of kind ``reported``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmbench.leaderboard.statistics import Interval, Unit, interval_over_seeds
from cmbench.records.record import MetricRecord, Record

REPORTED = "reported"


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
    family: str = ""
    reference: str = ""
    year: int = 0
    conditional: bool | None = None
    recipe: str = ""
    sampler: str = ""
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
    note: str = ""
    #: Title and reason of the protocol a reported row was measured under.
    protocol: tuple[str, str] = ("", "")
    #: What else is known about a reported row: place, table, protocol.
    details: Mapping[str, str] = field(default_factory=dict)
    #: The cells of a measured row, in seed order, each with the file it was read from.
    cells: tuple[tuple[Path, Record], ...] = ()

    @property
    def label(self) -> str:
        """The name in tables and charts: as printed by the source, or the method's own."""
        return self.title if self.kind == REPORTED else self.method

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


def setting(record: Record) -> dict[str, Any]:
    """Return everything of ``record`` that decides its numbers except the seeds."""
    training, sampling, dataset = record.training, record.sampling, record.dataset
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
    return sorted(rows, key=row_order)


def row_order(row: Row) -> tuple[Any, ...]:
    """Sort key of rows: method, recipe, sampler, conditioning, NFE, then identity."""
    return (row.method, row.recipe, row.sampler, bool(row.conditional), row.nfe or 0, row.id)


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
        family=first.family,
        reference=first.reference,
        year=first.year,
        conditional=first.conditional,
        recipe=first.training.recipe,
        sampler=first.sampling.sampler,
        dtype=first.sampling.dtype,
        # 0 stands for scored samples whose cost is not stated.
        nfe=first.sampling.nfe or None,
        nfe_text=str(first.sampling.nfe or "not stated"),
        parameters=first.training.parameters or None,
        num_samples=min(record.sampling.num_samples for _, record in members),
        protocol_samples=max(record.sampling.protocol_samples for _, record in members),
        rank_metric=first.rank_metric,
        measurements=measurements,
        marks=_marks(first),
        cells=tuple(members),
    )


def _marks(record: Record) -> tuple[str, ...]:
    """Return how a row differs from one made the usual way."""
    sampling = record.sampling
    tuned = ("tuned sigmas",) if sampling.tuned is not None else ()
    lower = (sampling.dtype,) if sampling.dtype != "float32" else ()
    return tuned + lower


def _measurement(
    name: str, metric: MetricRecord, records: Sequence[Record]
) -> MetricSummary | None:
    units = tuple(
        Unit(record.training.seed, record.sampling.seed, value)
        for record in records
        if (value := record.metrics[name].value) is not None
    )
    if not units:
        return None
    return MetricSummary(
        name, metric.key, metric.higher_is_better, interval_over_seeds(units), units
    )
