"""Cells: sample, measure, and leave a record."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.errors import InterruptedRunError
from cmbench.files import write_atomically
from cmbench.measure.gallery import grid_png, save_pngs
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.probe import placed
from cmbench.metrics.reference import Floor, Reference
from cmbench.metrics.scores import check_metric
from cmbench.metrics.suite import MetricSuite
from cmbench.metrics.values import MetricValue
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.provenance import environment
from cmbench.records.record import (
    DTYPES,
    Artifact,
    DatasetRecord,
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
from cmbench.sweep.extractors import custom_metrics, load_extractor
from cmbench.sweep.plans import CellPlan, RunPlan
from cmbench.sweep.references import dataset_reference
from cmbench.sweep.run_log import read_log
from cmbench.sweep.runs import MAIN, TrainedRun, build_modules, load_weights
from cmbench.sweep.threads import use_threads

#: Images in the sample grid of a record: always the first of the sampling seed.
GRID_IMAGES = 64
#: Points kept of a training curve.
CURVE_POINTS = 200


def measure_cell(
    context: Context, trained: TrainedRun, cell: CellPlan, *, save_samples: bool = False
) -> Record:
    """Sample a cell, measure every metric of the dataset's protocol, return the record.

    Raises:
        UserError: images that are not finite, an NFE that was not as declared, missing weights.
    """
    assert cell.sampling is not None
    use_threads(int(trained.result.get("threads", context.threads)))
    spec = context.dataset_spec(cell.run.dataset)
    dataset = context.dataset(cell.run.dataset)
    extractor, reference = open_reference(context, spec, dataset)
    sampler, snapshots = open_sampler(context, trained, cell, dataset)
    suite = open_suite(context, spec, dataset, extractor, reference, cell)
    task = f"sample {cell.cell}"
    context.reporter.task_started(task, task, cell.num_samples)
    shown: list[Tensor] = []
    try:
        for batch in sampler.stream(cell.num_samples, cell.batch_size):
            require_time(context, cell)
            images = dataset.to_pixels(batch.images)
            suite.update(images, batch.noise, batch.labels)
            missing = GRID_IMAGES - sum(len(s) for s in shown)
            if missing > 0:
                shown.append(images[:missing].cpu())
            if save_samples:
                save_pngs(images, batch.first, context.workspace.samples(cell.cell))
            speed = {"images_per_s": sampler.images / max(sampler.seconds, 1e-9)}
            context.reporter.task_progress(task, sampler.images, speed)
    finally:
        context.reporter.task_finished(task)
    sampler.check_nfe()
    metrics = {n: metric_record(context, n, v) for n, v in suite.finalize().items()}
    rank = spec.metrics[0]
    if rank in metrics and reference.features is not None:
        metrics[rank] = with_floor(metrics[rank], floor_of(context, spec, reference))
    record = base_record(context, cell, "finished", trained)
    return record.model_copy(
        update={
            "metrics": metrics,
            "dataset": dataset_record(spec, dataset, extractor, reference),
            "sampling": sampling_record(cell, spec, sampler),
            "training": record.training.model_copy(update={"snapshots": dict(snapshots)}),
            "warnings": [*suite.warnings, *too_few(cell, spec)],
            "artifacts": artifacts(context, trained, cell, torch.cat(shown)),
        }
    )


def require_time(context: Context, cell: CellPlan) -> None:
    """Raise :class:`InterruptedRunError` if a stop was asked for."""
    if reason := context.should_stop():
        raise InterruptedRunError(
            f"cell {cell.cell}",
            f"{reason}; finished cells have their records",
            remedy="start the same command again to go on",
        )


# ---- opening ------------------------------------------------------------------------------------


def require_metrics(context: Context, name: str) -> None:
    """Open everything that a dataset's metrics need, before any training or sampling.

    Raises:
        MissingError: data or weights are not here; the message says how to get them.
        UserError: a metric that the extractor or the reference cannot serve.
    """
    spec = context.dataset_spec(name)
    extractor, reference = open_reference(context, spec, context.dataset(name))
    for metric in spec.metrics:
        check_metric(metric, extractor, reference, custom_metrics(context))


def open_reference(
    context: Context, spec: DatasetSpec, dataset: Dataset
) -> tuple[Extractor, Reference]:
    """Return the protocol's extractor and reference, opened once and cached in the workspace."""
    opened = context.references.get(spec.name)
    if opened is not None:
        return opened
    size = () if spec.latent else spec.data_shape
    extractor = placed(load_extractor(context, spec.extractor, spec.metrics), context.device, size)
    reference = dataset_reference(context, dataset, extractor, spec.quantize)
    context.references[spec.name] = extractor, reference
    return context.references[spec.name]


def open_sampler(
    context: Context, trained: TrainedRun, cell: CellPlan, dataset: Dataset
) -> tuple[Sampler, Mapping[str, str]]:
    """Load the run's weights; return its sampler and the snapshots of a reconstructed average."""
    assert cell.sampling is not None
    method, modules = build_modules(context, trained.plan, None)
    snapshots = load_weights(trained.weights(cell.sampling.variant), modules, cell.ema)
    sampler = Sampler(
        method,
        modules,
        cell.sampling,
        seed=cell.seed,
        labels=lambda start, count: dataset.labels_for(count, cell.seed, start),
        precision=cell.precision,
        compiled=context.compile,
    )
    return sampler, snapshots


def open_suite(
    context: Context,
    spec: DatasetSpec,
    dataset: Dataset,
    extractor: Extractor,
    reference: Reference,
    cell: CellPlan,
) -> MetricSuite:
    """Return the suite of the protocol's metrics."""
    analytic = getattr(dataset, "mixture", None) is not None
    sigma_max = cell.sampling.sigmas[0] if cell.sampling else math.nan

    def exact(noise: Tensor, labels: Tensor | None) -> Tensor:
        conditional = labels if cell.run.config.conditional else None
        found = dataset.exact_flow_map(noise, conditional, sigma_max=sigma_max)
        assert found is not None
        return found

    return MetricSuite(
        spec.metrics,
        extractor=extractor,
        reference=reference,
        quantization=spec.quantize,
        exact=exact if analytic else None,
        data_std=dataset.sigma_data,
        class_counts=dataset.class_counts,
        custom=custom_metrics(context),
    )


# ---- records ------------------------------------------------------------------------------------


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


def floor_of(context: Context, spec: DatasetSpec, reference: Reference) -> Floor:
    """Return what two disjoint real halves score; it takes a while, so once a process."""
    if spec.name not in context.floors:
        context.floors[spec.name] = reference.floor()
    return context.floors[spec.name]


def with_floor(metric: MetricRecord, floor: Floor) -> MetricRecord:
    """Add the floor to the ranking metric."""
    detail = {
        **metric.detail,
        "floor": floor.frechet,
        "floor_count": floor.count,
        "ceiling_precision": floor.manifold.precision,
        "ceiling_recall": floor.manifold.recall,
    }
    return metric.model_copy(update={"detail": _finite(detail)})


def base_record(
    context: Context, cell: CellPlan, status: Status, trained: TrainedRun | None, reason: str = ""
) -> Record:
    """Return what every record has, whatever became of the cell."""
    run, spec = cell.run, context.dataset_spec(cell.run.dataset)
    owner = context.plugins.methods.owners[run.spec.name]
    result: Mapping[str, Any] = trained.result if trained else {}
    made = export_of(cell, result)
    return Record(
        cell=cell.cell,
        status=status,
        kind="measured" if run.imported is None else "imported checkpoint",
        reason=reason,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=context.command,
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
        training=TrainingRecord(
            run=run.run_id,
            seed=run.seed,
            recipe=run.recipe,
            config=run.table,
            config_sha256=run.config_sha256,
            teacher=result.get("teacher") if trained else _teacher_run(run),
            parameters=result.get("parameters", 0),
            images_seen=made.get("images_seen", 0),
            network_evaluations=made.get("network_evaluations", 0),
            seconds_by_phase=made.get("seconds_by_phase", {}),
            checkpoint_sha256=made.get("sha256", ""),
            ema=cell.ema,
        ),
        sampling=sampling_record(cell, spec, None),
        rank_metric=spec.metrics[0],
        environment=environment(
            int(result.get("threads", context.threads)),
            context.gpu,
            int(result.get("world_size", context.world.size)),
        ),
    )


def _teacher_run(run: RunPlan) -> str | None:
    """Return the teacher's run that the hash of the recipe covers, though it was not trained."""
    return run.teacher.run_id if run.teacher is not None else None


def export_of(cell: CellPlan, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is known of the weights that a cell samples: hash, images seen, cost."""
    variant = cell.sampling.variant if cell.sampling else ""
    found: Mapping[str, Any] = result.get("exports", {}).get(variant or MAIN, {})
    return found


def sampling_record(cell: CellPlan, spec: DatasetSpec, sampler: Sampler | None) -> SamplingRecord:
    """Return how the images were (or would have been) made."""
    plan = cell.sampling
    seconds = sampler.seconds if sampler else None
    return SamplingRecord(
        nfe=cell.nfe,
        nfe_measured=sampler.nfe_measured if sampler else None,
        sampler=plan.sampler if plan else "",
        times=list(plan.sigmas) if plan else [],
        tuned=dict(cell.tuned) if cell.tuned else None,
        seed=cell.seed,
        num_samples=cell.num_samples,
        protocol_samples=spec.num_samples,
        batch_size=cell.batch_size,
        dtype=DTYPES[cell.precision],
        quantize=spec.quantize,
        labels="class frequencies of the dataset" if cell.run.config.conditional else "",
        seconds=seconds,
        images_per_s=cell.num_samples / seconds if seconds else None,
    )


def dataset_record(
    spec: DatasetSpec, dataset: Dataset, extractor: Extractor, reference: Reference
) -> DatasetRecord:
    """Return what the images were compared with."""
    return DatasetRecord(
        name=spec.name,
        revision=dataset.revision,
        sha256=dataset.sha256,
        reference_count=reference.count,
        reference_sha256=reference.sha256,
        extractor=extractor.name,
        extractor_sha256=extractor.weights_sha256,
    )


def too_few(cell: CellPlan, spec: DatasetSpec) -> Iterable[str]:
    """Warn about a sample count below the protocol's."""
    if cell.num_samples < spec.num_samples:
        yield (
            f"{cell.num_samples} samples instead of the protocol's {spec.num_samples}: "
            "never ranked with full ones"
        )


def failed_record(
    context: Context, cell: CellPlan, reason: str, trained: TrainedRun | None = None
) -> Record:
    """Return the record of a cell that failed."""
    return base_record(context, cell, "failed", trained, reason)


def skipped_record(context: Context, cell: CellPlan) -> Record:
    """Return the record of a cell that its method declines."""
    return base_record(context, cell, "skipped", None, cell.declined)


# ---- artifacts ----------------------------------------------------------------------------------


def artifacts(
    context: Context, trained: TrainedRun, cell: CellPlan, images: Tensor
) -> dict[str, Artifact]:
    """Write the sample grid and the training curve beside the record."""
    folder = context.workspace.records(cell.run.dataset)
    found = {"grid": _artifact(folder, f"{cell.cell}.png", grid_png(images))}
    curve = training_curve(trained.folder)
    if curve:
        found["curve"] = _artifact(folder, f"curves/{cell.run.name}.csv", curve)
    return found


def _artifact(folder: Path, name: str, data: bytes) -> Artifact:
    write_atomically(folder / name, data)
    return Artifact(file=name, sha256=hashlib.sha256(data).hexdigest())


def training_curve(run_folder: Path) -> bytes:
    """Return at most :data:`CURVE_POINTS` rows of a run's log as CSV."""
    rows = read_log(run_folder)
    if not rows:
        return b""
    stride = max(1, math.ceil(len(rows) / CURVE_POINTS))
    kept = rows[::stride]
    columns = list(dict.fromkeys(key for row in kept for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    return text.getvalue().encode()
