"""What rows cost, quality against each cost, and the Pareto fronts.

Times and memory belong to hardware: they are compared between rows of equal hardware only. FLOPs,
parameters and counts of evaluations are compared between all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cmbench.leaderboard.rows import Row
from cmbench.records.record import Record


@dataclass(frozen=True)
class CostKind:
    """One cost: less is better.

    Args:
        key: name in tables.
        title: with its unit.
        help: what it is, in one line.
        of: reads it from a record; None if the record does not have it.
        hardware: names what a value belongs to; None if it is the same everywhere.
    """

    key: str
    title: str
    help: str
    of: Callable[[Record], float | None]
    hardware: Callable[[Record], str] | None = None


@dataclass(frozen=True)
class CostChart:
    """Points ``(row, cost, value of the metric)`` that may be compared, and their Pareto front."""

    kind: CostKind
    hardware: str
    metric_key: str
    points: tuple[tuple[str, float, float], ...]
    front: tuple[str, ...]


def _sampling_hardware(record: Record) -> str:
    return record.cost.hardware if record.cost else record.environment.hardware


def training_hardware(record: Record) -> str:
    """Return what training time belongs to."""
    return record.environment.hardware


def training_hours(record: Record) -> float | None:
    """Return device-hours of the run and of its teacher, without compilation.

    Wall time of all phases times processes. None if the run's is not known.
    """
    phases = record.training.seconds_by_phase
    if not phases:
        return None
    teacher = record.training.teacher_cost
    own = sum(phases.values()) * record.environment.world_size / 3600
    return own + (teacher.device_hours if teacher else 0.0)


def training_evaluations(record: Record) -> float | None:
    """Return network evaluations of the run, of its teacher and of making its generated data."""
    own, teacher = record.training.network_evaluations, record.training.teacher_cost
    return float(own + (teacher.network_evaluations if teacher else 0)) if own else None


def _total_flops(record: Record) -> float | None:
    cost = record.cost
    if cost is None or cost.flops_per_image is None:
        return None
    return cost.flops_per_image + ((cost.decoder.flops_per_image or 0.0) if cost.decoder else 0.0)


TRAINING_HOURS = CostKind(
    "training_h",
    "Device-hours",
    "training with its teacher's: wall time x processes, without compilation; compare on equal"
    " hardware only",
    training_hours,
    training_hardware,
)
#: What charts show beside ``COSTS``; tables have a column of it for reported rows too.
PARAMETERS = CostKind(
    "parameters",
    "Parameters",
    "of the network that samples",
    lambda r: float(r.training.parameters) or None,
)
#: Every measured cost, in the order of columns and charts.
COSTS = (
    CostKind(
        "flops",
        "FLOPs per image",
        "measured for one image, decoder included; a multiply-add counts as two",
        _total_flops,
    ),
    CostKind(
        "latency_ms",
        "Latency [ms]",
        "one image (batch 1) after warm-up, not compiled, without the decoder; compare on equal"
        " hardware only",
        lambda r: r.cost.latency_s * 1000 if r.cost else None,
        _sampling_hardware,
    ),
    CostKind(
        "ms_per_image",
        "Time per image [ms]",
        "at the fastest batch size tried, without the decoder; compare on equal hardware only",
        lambda r: 1000 / r.cost.throughput_images_per_s if r.cost else None,
        _sampling_hardware,
    ),
    CostKind(
        "memory_mib",
        "Peak memory [MiB]",
        "while sampling; on a GPU what is allocated, on a CPU that of the whole process",
        lambda r: r.cost.peak_memory_bytes / 2**20 if r.cost and r.cost.peak_memory_bytes else None,
        _sampling_hardware,
    ),
    CostKind(
        "decoder_ms",
        "Decoder [ms]",
        "making the picture of one latent; compare on equal hardware only",
        lambda r: r.cost.decoder.latency_s * 1000 if r.cost and r.cost.decoder else None,
        _sampling_hardware,
    ),
    TRAINING_HOURS,
    CostKind(
        "training_evaluations",
        "Training evaluations",
        "network evaluations in training, with the teacher's training and generated data; a"
        " backward pass counts as two",
        training_evaluations,
    ),
)


def mean_cost(row: Row, kind: CostKind) -> tuple[float, str] | None:
    """Return the mean over a row's records and its hardware (empty if it plays no part).

    None if no record has it, or if the records are of several hardware: their mean says nothing.
    """
    found = [(v, record) for _, record in row.cells if (v := kind.of(record)) is not None]
    if not found:
        return None
    names = {kind.hardware(record) if kind.hardware else "" for _, record in found}
    if len(names) > 1:
        return None
    return sum(value for value, _ in found) / len(found), names.pop()


def hardware_of(row: Row) -> str:
    """Return the hardware of a row's times; several joined by commas."""
    return ", ".join(dict.fromkeys(_sampling_hardware(record) for _, record in row.cells))


def cost_charts(rows: Iterable[Row], metric: str) -> list[CostChart]:
    """Return quality against each cost: one chart per cost, hardware and metric key.

    Rows that have fewer samples than their protocol asks for are left out, as are groups of one.
    """
    charts: dict[tuple[str, str, str], list[tuple[str, float, float]]] = {}
    higher: dict[str, bool] = {}
    for row in rows:
        measured = row.measurements.get(metric)
        if measured is None or not row.cells or not row.full_samples:
            continue
        higher[measured.key] = measured.higher_is_better
        for kind in (*COSTS, PARAMETERS):
            if (found := mean_cost(row, kind)) is not None:
                group = charts.setdefault((kind.key, found[1], measured.key), [])
                group.append((row.id, found[0], measured.mean))
    kinds = {kind.key: kind for kind in (*COSTS, PARAMETERS)}
    return [
        CostChart(kinds[key], hardware, metric_key, tuple(points), front)
        for key in kinds
        for (cost, hardware, metric_key), points in charts.items()
        if cost == key
        and len(points) > 1
        and (front := pareto_front(points, higher_is_better=higher[metric_key]))
    ]


def pareto_front(
    points: Sequence[tuple[str, float, float]], *, higher_is_better: bool
) -> tuple[str, ...]:
    """Return the names of the points that none beats in cost without being worse in value.

    Args:
        points: name, cost (less is better) and value of each.
        higher_is_better: whether larger values are better.

    Returns:
        Names by ascending cost; of points that are equal in both, all.
    """
    sign = -1.0 if higher_is_better else 1.0
    ordered = sorted(points, key=lambda point: (point[1], sign * point[2]))
    front: list[tuple[str, float, float]] = []
    for point in ordered:
        value = sign * point[2]
        if not front or value < sign * front[-1][2] or front[-1][1:] == point[1:]:
            front.append(point)
    return tuple(name for name, _, _ in front)
