"""Score samples that somebody else made, and leave a record of the kind ``scored samples``."""

from __future__ import annotations

import hashlib
import inspect
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from cmbench.bench.cells import metric_record
from cmbench.bench.context import Context
from cmbench.bench.provenance import environment
from cmbench.bench.record import (
    DatasetRecord,
    PluginRecord,
    Record,
    SamplingRecord,
    TrainingRecord,
)
from cmbench.errors import UserError, unknown_name
from cmbench.metrics.evaluation import Evaluation, evaluate, plan_metrics, protocol_warnings
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.quantize import RULES
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import cached_reference
from cmbench.metrics.reference_import import import_reference
from cmbench.metrics.reference_store import ReferenceStore
from cmbench.metrics.sample_open import open_samples
from cmbench.metrics.sample_sources import ReadOptions, SampleSource
from cmbench.metrics.scores import is_spatial, needs
from cmbench.metrics.suite import MetricSuite
from cmbench.plugin.specs import DatasetSpec

_NOT_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")
_STATISTICS = {".safetensors", ".pt", ".pkl"}


@dataclass(frozen=True)
class ScoreRequest:
    """What ``cmbench eval`` was asked for.

    ``dataset`` gives the protocol and, without ``reference``, the real images. ``reference`` is a
    saved reference, a file of reference statistics, or a source of images.
    """

    samples: str
    dataset: str | None = None
    reference: str | None = None
    metrics: tuple[str, ...] = ()
    extractor: str | None = None
    weights: Path | None = None
    library: bool = False
    trust: bool = False
    label: str | None = None
    nfe: int = 0
    seed: int = 0
    quantize: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    batch_size: int = 250


def score(context: Context, request: ScoreRequest) -> Record:
    """Evaluate samples and return their record; everything cheap is checked before any work.

    Raises:
        UserError: anything about the samples, the reference, the weights or the metrics that
            cannot be.
    """
    spec = context.plugins.datasets.get(request.dataset) if request.dataset else None
    if spec is None and request.reference is None:
        raise UserError(
            "cmbench eval", "nothing to compare with", allowed="--dataset or --reference",
            remedy="name a dataset, or give real images or reference statistics",
        )  # fmt: skip
    rule = request.quantize or (spec.quantize if spec else "round")
    if rule not in RULES:
        raise unknown_name("--quantize", "quantization rule", rule, RULES)
    plan = plan_of(request, spec)
    extractors = {
        name: open_extractor(context, request, name, spatial=any(map(is_spatial, metrics)))
        for name, metrics in plan.items()
    }
    read = replace(request.read, channels=channels_of(spec, extractors))
    source = open_samples(request.samples, read)
    suites = []
    for name, metrics in plan.items():
        reference = None
        if any(needs(metric) != "logits" for metric in metrics) or spec is not None:
            reference = open_reference(context, request, spec, extractors[name], rule, read)
        suites.append(
            MetricSuite(
                metrics, extractor=extractors[name], reference=reference, quantization=rule,
                class_counts=class_counts(context, spec),
            )
        )  # fmt: skip
    began = time.perf_counter()
    found = run(context, source, suites, request.batch_size)
    seconds = time.perf_counter() - began
    return record_of(context, request, spec, source, suites, found, rule, seconds)


def plan_of(request: ScoreRequest, spec: DatasetSpec | None) -> dict[str, list[str]]:
    """Return the metrics by extractor; the protocol's where none were asked for."""
    default = request.extractor or (spec.extractor if spec else "inception")
    asked = request.metrics
    if not asked and spec is not None:
        asked = tuple(metric for metric in spec.metrics if needs(metric) != "flow map")
    plan = plan_metrics(asked or ("fid", "is", "pr", "kid"), default)
    if request.weights is not None and len(plan) > 1:
        raise UserError(
            "--weights", f"one file for the extractors {', '.join(plan)}",
            allowed="metrics of one extractor", remedy="run once for each extractor",
        )  # fmt: skip
    return plan


def open_extractor(
    context: Context, request: ScoreRequest, name: str, *, spatial: bool
) -> Extractor:
    """Return an extractor on the device, with the options that it knows."""
    factory: Any = context.plugins.extractors.load(name)
    known = inspect.signature(factory).parameters
    options: dict[str, Any] = {}
    if "implementation" in known and request.library:
        options["implementation"] = "library"
    if "spatial" in known and spatial:
        options["spatial"] = True
    if "trust" in known and request.trust:
        options["trust"] = True
    extractor: Extractor = factory(request.weights, **options).to(context.device)
    return extractor


def channels_of(spec: DatasetSpec | None, extractors: dict[str, Extractor]) -> int:
    """Return the channels that samples should have: the dataset's, or the extractor's."""
    if spec is not None:
        return spec.data_shape[0]
    return 1 if set(extractors) == {"digits-cnn"} else 3


def class_counts(context: Context, spec: DatasetSpec | None) -> Sequence[int]:
    """Return the real images a class, where the dataset has classes and is here."""
    if spec is None or not spec.num_classes:
        return ()
    return context.dataset(spec.name).class_counts


def open_reference(
    context: Context,
    request: ScoreRequest,
    spec: DatasetSpec | None,
    extractor: Extractor,
    rule: str,
    read: ReadOptions,
) -> Reference:
    """Return what the samples are compared with, from the cache where it is there."""
    cache = context.workspace.cache / "references"
    if request.reference is None:
        assert spec is not None
        dataset = context.dataset(spec.name)
        reference = cached_reference(
            dataset.reference_images, extractor, source=spec.name, source_sha256=dataset.sha256,
            quantization=rule, folder=cache,
        )  # fmt: skip
        return reference.to(context.device)
    saved = saved_reference(context, request.reference, extractor)
    if saved is not None:
        return saved.to(context.device)
    images = open_samples(
        request.reference, ReadOptions(channels=read.channels, value_range=read.value_range)
    )

    def batches() -> Iterator[Tensor]:
        for batch, _ in images.batches(request.batch_size):
            yield batch

    reference = cached_reference(
        batches, extractor, source=Path(request.reference).stem, quantization=rule, folder=cache,
        source_sha256=content_hash(images, request.batch_size),
    )  # fmt: skip
    return reference.to(context.device)


def saved_reference(context: Context, given: str, extractor: Extractor) -> Reference | None:
    """Return reference statistics that ``given`` means, or None if it means images."""
    path = Path(given)
    if path.suffix in _STATISTICS and path.is_file():
        return import_reference(path, extractor=None)
    if path.suffix == ".npz" and path.is_file():
        try:
            return import_reference(path)
        except UserError as error:
            if "holds" not in error.problem:
                raise
            return None
    return None if path.exists() or ":" in given else store_of(context).get(given)


def store_of(context: Context) -> ReferenceStore:
    """Return the workspace's references: imported and computed."""
    workspace = context.workspace
    return ReferenceStore(workspace.root / "references", workspace.cache / "references")


def content_hash(source: SampleSource, batch_size: int) -> str:
    """Return a hash of a source's pixels in order."""
    digest = hashlib.sha256()
    for images, _ in source.batches(batch_size):
        digest.update(images.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def run(
    context: Context, source: SampleSource, suites: list[MetricSuite], batch_size: int
) -> Evaluation:
    """Evaluate with progress."""
    task = f"score {source.name}"
    began = time.perf_counter()
    context.reporter.task_started(task, task, source.count or 0)

    def progress(count: int) -> None:
        speed = {"images_per_s": count / max(time.perf_counter() - began, 1e-9)}
        context.reporter.task_progress(task, count, speed)

    try:
        return evaluate(source, suites, batch_size=batch_size, progress=progress)
    finally:
        context.reporter.task_finished(task)


def record_of(
    context: Context,
    request: ScoreRequest,
    spec: DatasetSpec | None,
    source: SampleSource,
    suites: list[MetricSuite],
    found: Evaluation,
    rule: str,
    seconds: float,
) -> Record:
    """Return the record of scored samples."""
    label = as_name(request.label or Path(source.name.partition(":")[0]).stem)
    keys = "\n".join([found.sha256, *(m.key for m in found.metrics.values())])
    digest = hashlib.sha256(keys.encode()).hexdigest()
    protocol = spec.num_samples if spec else found.count
    first = suites[0]
    assert first.extractor is not None
    reference = first.reference
    dataset = context.dataset(spec.name) if spec is not None else None
    name = spec.name if spec else as_name(reference.key.source if reference else "none")
    kept_labels = ", ".join(f"{k}: {n}" for k, n in list(found.class_counts.items())[:20])
    warnings = [*found.warnings, *protocol_warnings(found.count, protocol)]
    if not request.nfe:
        warnings.append("network evaluations a sample are not stated: give --nfe to say them")
    return Record(
        cell=f"{label}-n{found.count}-{digest[:10]}",
        status="finished",
        kind="scored samples",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=context.command,
        method=label,
        title=f"samples from {source.kind}",
        family="scored samples",
        plugin=PluginRecord(name="scored samples", distribution="none", version=""),
        conditional=bool(found.class_counts),
        dataset=DatasetRecord(
            name=name,
            revision=dataset.revision if dataset else "",
            sha256=dataset.sha256 if dataset else "",
            reference_count=reference.count if reference else None,
            reference_sha256=reference.sha256 if reference else "",
            extractor=first.extractor.name,
            extractor_sha256=first.extractor.weights_sha256,
        ),
        training=TrainingRecord(
            run=f"samples/{found.sha256[:16]}", seed=request.seed, recipe="", config={},
            config_sha256="", parameters=0, images_seen=0,
        ),
        sampling=SamplingRecord(
            nfe=request.nfe, sampler=source.kind, seed=request.seed, num_samples=found.count,
            protocol_samples=protocol, batch_size=request.batch_size, quantize=rule,
            labels=f"counts by class: {kept_labels}" if kept_labels else "", seconds=seconds,
        ),
        rank_metric=next(iter(found.metrics)),
        metrics={n: metric_record(context, n, v) for n, v in found.metrics.items()},
        environment=environment(context.threads, context.gpu),
        warnings=warnings,
    )  # fmt: skip


def as_name(text: str) -> str:
    """Return ``text`` in the alphabet of names."""
    return _NOT_A_NAME.sub("-", text).strip("-._+")[:100] or "samples"
