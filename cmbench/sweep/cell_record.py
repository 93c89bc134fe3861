"""The record of a cell: what every record has, whatever became of the cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cmbench.data.base import Dataset
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.reference import Reference
from cmbench.metrics.values import MetricValue
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.cost import TeacherCost
from cmbench.records.provenance import environment
from cmbench.records.record import (
    DTYPES,
    LABELS,
    DatasetRecord,
    GeneratedRecord,
    MetricRecord,
    PluginRecord,
    Record,
    SamplingRecord,
    Status,
    TrainingRecord,
    finite_or_none,
)
from cmbench.sampling import Sampler
from cmbench.sweep.context import Context
from cmbench.sweep.plans import CellPlan, RunPlan
from cmbench.sweep.run_files import MAIN, read_result_file
from cmbench.sweep.runs import TrainedRun


def now() -> str:
    """Return the time of a record: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def dataset_record(
    name: str, dataset: Dataset | None, reference: Reference | None, extractor: Extractor
) -> DatasetRecord:
    """Return what samples were compared with."""
    return DatasetRecord(
        name=name,
        revision=dataset.revision if dataset else "",
        sha256=dataset.sha256 if dataset else "",
        reference_count=reference.count if reference else None,
        reference_sha256=reference.moments.sha256 if reference else "",
        extractor=extractor.name,
        extractor_sha256=extractor.weights_sha256,
    )


def metric_record(context: Context, name: str, value: MetricValue) -> MetricRecord:
    """Return a metric's part of the record."""
    spec = context.plugins.metrics.specs.get(name)
    interval = value.interval
    if interval is not None and not all(map(math.isfinite, interval)):
        interval = None
    return MetricRecord(
        value=finite_or_none(value.value),
        higher_is_better=value.higher_is_better,
        key=value.key,
        standard_error=finite_or_none(value.standard_error),
        interval=interval,
        unit=spec.unit if spec else "",
        detail=_finite(dict(value.detail)),
    )


def _finite(value: Any) -> Any:
    """Return JSON-ready data without NaN or infinities."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def base_record(
    context: Context,
    cell: CellPlan,
    status: Status,
    trained: TrainedRun | None = None,
    reason: str = "",
) -> Record:
    """Return the record of a cell before anything is known of its samples."""
    run, spec = cell.run, context.dataset_spec(cell.run.dataset)
    owner = context.plugins.methods.owners[run.spec.name]
    result: Mapping[str, Any] = trained.result if trained else {}
    threads = int(result.get("threads", context.threads))
    world_size = int(result.get("world_size", context.world.size))
    return Record(
        cell=cell.cell,
        status=status,
        kind="measured" if run.imported is None else "imported checkpoint",
        reason=reason,
        created=now(),
        command=context.command,
        run_file_sha256=context.run_file_sha256,
        method=run.spec.name,
        title=run.spec.title,
        family=run.spec.family,
        reference=run.spec.reference,
        year=run.spec.year,
        conditional=run.config.conditional,
        plugin=PluginRecord(
            name=owner.name, distribution=owner.distribution, version=owner.version
        ),
        dataset=DatasetRecord(name=spec.name),
        training=_training_record(context, cell, trained),
        sampling=sampling_record(cell, spec, None),
        rank_metric=spec.metrics[0],
        environment=environment(threads, context.gpu, world_size),
    )


def _training_record(
    context: Context, cell: CellPlan, trained: TrainedRun | None
) -> TrainingRecord:
    """Return what is known of the weights that a cell samples, and of how they were trained."""
    run = cell.run
    result: Mapping[str, Any] = trained.result if trained else {}
    variant = cell.sampling.variant if cell.sampling else ""
    export: Mapping[str, Any] = result.get("exports", {}).get(variant or MAIN, {})
    # The hash of the recipe covers a teacher's run, though it may not have been trained.
    planned_teacher = (run.teacher.run_id or run.teacher.reference) if run.teacher else None
    return TrainingRecord(
        run=run.run_id,
        seed=run.seed,
        recipe=run.recipe,
        config=run.table,
        config_sha256=run.config_sha256,
        teacher=result.get("teacher") if trained else planned_teacher,
        parameters=result.get("parameters", 0),
        images_seen=export.get("images_seen", 0),
        network_evaluations=export.get("network_evaluations", 0),
        seconds_by_phase=export.get("seconds_by_phase", {}),
        generated={k: GeneratedRecord(**v) for k, v in export.get("generated", {}).items()},
        checkpoint_sha256=export.get("sha256", ""),
        ema=cell.ema,
        overrides=None if run.overrides is None else dict(run.overrides),
        teacher_cost=_teacher_cost(context, run) if trained else None,
    )


def _teacher_cost(context: Context, run: RunPlan) -> TeacherCost | None:
    """Return what the training of the run's teacher took, if that is a run of this workspace."""
    teacher = run.teacher.run if run.teacher else None
    if teacher is None or teacher.imported is not None:
        return None
    result = read_result_file(context.workspace.run(teacher.run_id), teacher.run_id)
    if result is None:
        return None
    export = result["exports"][MAIN]
    hours = sum(export["seconds_by_phase"].values()) * result["world_size"] / 3600
    return TeacherCost(network_evaluations=export["network_evaluations"], device_hours=hours)


def sampling_record(cell: CellPlan, spec: DatasetSpec, sampler: Sampler | None) -> SamplingRecord:
    """Return how the images were (or would have been) made."""
    plan = cell.sampling
    return SamplingRecord(
        nfe=cell.nfe,
        adaptive=plan.adaptive if plan else False,
        nfe_measured=sampler.nfe_measured if sampler else None,
        sampler=plan.sampler if plan else "",
        sigmas=list(plan.sigmas) if plan else [],
        tuned=dict(cell.tuned) if cell.tuned else None,
        seed=cell.seed,
        num_samples=cell.num_samples,
        protocol_samples=spec.num_samples,
        batch_size=cell.batch_size,
        dtype=DTYPES[cell.precision],
        quantize=spec.quantize,
        labels=LABELS[cell.labels] if cell.run.config.conditional else "",
        seconds=sampler.seconds if sampler else None,
        images_per_s=sampler.images_per_s if sampler else None,
        overrides=dict(cell.overrides),
    )
