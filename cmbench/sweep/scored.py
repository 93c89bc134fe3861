"""Score samples that somebody else made, and leave a record of the kind ``scored samples``."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.measure.evaluation import Evaluation, evaluate, plan_metrics
from cmbench.metrics._files import sha256_file
from cmbench.metrics.census import Census
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.memorisation import Memorisation, memorisation
from cmbench.metrics.probe import placed
from cmbench.metrics.quantize import RULES, STORED
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import (
    cached_census,
    cached_reference,
    load_reference,
    save_reference,
)
from cmbench.metrics.reference_import import holds_images, import_reference, with_reference_images
from cmbench.metrics.scores import MANIFOLD, needs
from cmbench.metrics.suite import MetricSuite
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.record import Record
from cmbench.samples.opening import open_samples
from cmbench.samples.source import PIPELINE, RANGES, ReadOptions, SampleSource
from cmbench.sweep.context import Context
from cmbench.sweep.extractors import custom_metrics, load_extractor
from cmbench.sweep.imported import PREFIX
from cmbench.sweep.references import dataset_reference, store_of
from cmbench.sweep.run_samples import find_run, open_imported_samples, open_run, run_dataset
from cmbench.sweep.scored_record import Scored, ScoreRequest, record_of
from cmbench.training.memory import sampling_memory_explained

_STATISTICS = {".safetensors", ".pt", ".pkl"}


def score(context: Context, request: ScoreRequest) -> Record:
    """Evaluate samples and return their record; everything cheap is checked before any work.

    Raises:
        UserError: anything about the samples, the reference, the weights or the metrics that
            cannot be.
    """
    trained = find_run(context, request.samples)
    if trained is not None and request.dataset is None and request.reference is None:
        request = replace(request, dataset=run_dataset(trained))
    spec = context.dataset_spec(request.dataset, "cmbench eval") if request.dataset else None
    if spec is None and request.reference is None:
        raise UserError(
            "cmbench eval",
            "nothing to compare with",
            allowed="--dataset or --reference",
            remedy="name a dataset, or give real images or reference statistics",
        )
    # A run says by its dataset what its samples are, whatever they are compared with.
    own = context.dataset_spec(run_dataset(trained)) if trained else None
    known = spec or own
    rule = request.quantize or (known.quantize if known else "round")
    if rule not in RULES:
        raise unknown_name("--quantize", "quantization rule", rule, RULES)
    plan = plan_of(context, request, known)
    size = known.data_shape if known is not None and not known.latent else ()
    extractors = open_extractors(context, request, plan, size)
    read = reading(request, known, channels_of(known, extractors))
    odd: list[str] = []
    dataset = dataset_of(context, request, spec)
    source = open_source(context, request.samples, read, request.nfe, request.dataset)
    require_read(request, source)
    custom, suites = custom_metrics(context), []
    for name, metrics in plan.items():
        reference = None
        if any(needs(metric, custom) != "logits" for metric in metrics) or spec is not None:
            reference = open_reference(
                context, request, spec, extractors[name], metrics, rule, read, odd
            )
        census = None
        if reference is not None and reference.census is None:
            census = census_of(context, request, dataset)
        suites.append(
            MetricSuite(
                metrics,
                extractor=extractors[name],
                reference=reference,
                quantization=rule,
                class_counts=dataset.class_counts if dataset is not None else (),
                custom=custom,
                census=census,
                rule_of_bytes=request.quantize or STORED,
            )
        )
    unseen = None
    if request.held_out is not None:
        first = next(iter(extractors.values()))
        unseen = images_reference(context, request, request.held_out, first, rule, read, odd)
        require_features(suites[0].reference)
    began = time.perf_counter()
    found = run(context, source, suites, request.batch_size, size)
    if found.stored and request.quantize is None:
        rule = STORED
    seconds = time.perf_counter() - began
    copied = None if unseen is None else check_memorised(suites[0], unseen)
    notes = tuple(f"reference: {note}" for note in dict.fromkeys(odd))
    scored = Scored(spec, dataset, source, suites, found, rule, seconds, notes, copied)
    return record_of(context, request, scored)


def open_extractors(
    context: Context, request: ScoreRequest, plan: Mapping[str, Sequence[str]], size: Sequence[int]
) -> dict[str, Extractor]:
    """Return the extractors of a plan on the context's device, for images of ``size``."""
    return {
        name: placed(
            load_extractor(
                context,
                name,
                metrics,
                request.weights,
                library=request.library,
                trust=request.trust,
                approximations=request.approximations,
            ),
            context.device,
            size,
        )
        for name, metrics in plan.items()
    }


def reading(request: ScoreRequest, known: DatasetSpec | None, channels: int) -> ReadOptions:
    """Return how samples are read; raise ``UserError`` for a range that does not exist."""
    given = request.read.value_range
    if given is not None and given not in RANGES:
        raise UserError("--range", f"{given!r}", allowed=" | ".join(RANGES))
    protocol = known.num_samples if known else None
    return replace(request.read, channels=channels, protocol_samples=protocol)


def require_read(request: ScoreRequest, source: SampleSource) -> None:
    """Raise ``UserError`` for options that nothing among the samples would heed."""
    read, what = request.read, f"samples {source.name} are a {source.kind}"
    if read.steps is not None and source.kind != PIPELINE:
        raise UserError(
            "--steps",
            f"{what}, which takes none",
            allowed="a diffusers pipeline",
            remedy="leave --steps out; --nfe says what the samples cost",
        )
    others = request.reference is not None or request.held_out is not None
    if read.value_range is not None and not source.is_ranged and not others:
        raise UserError(
            "--range",
            f"{what} whose pixels need no range",
            allowed="arrays of floats",
            remedy="leave --range out",
        )


def require_features(reference: Reference | None) -> Tensor:
    """Return the features of the real images, for the check of memorised ones."""
    if reference is None:
        raise UserError("--held-out", "no reference", allowed="a metric that has a reference")
    return reference.with_features("memorisation")


def check_memorised(suite: MetricSuite, unseen: Reference) -> Memorisation:
    """Compare the samples' nearest real images with held-out ones."""
    samples, train = suite.samples.pool, require_features(suite.reference)
    assert samples is not None
    return memorisation(samples, train, require_features(unseen).to(train.device))


def plan_of(
    context: Context, request: ScoreRequest, spec: DatasetSpec | None
) -> dict[str, list[str]]:
    """Return the metrics by extractor; the protocol's where none were asked for."""
    default = request.extractor or (spec.extractor if spec else "inception")
    custom = custom_metrics(context)
    asked = request.metrics
    if not asked and spec is not None:
        asked = tuple(metric for metric in spec.metrics if needs(metric, custom) != "flow map")
    plan = plan_metrics(asked or ("fid", "is", "pr", "kid"), default, custom)
    if request.weights is not None and len(plan) > 1:
        raise UserError(
            "--weights",
            f"one file for the extractors {', '.join(plan)}",
            allowed="metrics of one extractor",
            remedy="run once for each extractor",
        )
    return plan


def channels_of(spec: DatasetSpec | None, extractors: dict[str, Extractor]) -> int:
    """Return the channels that samples should have: the dataset's, or the extractor's."""
    if spec is not None:
        return 3 if spec.latent else spec.data_shape[0]
    return 1 if set(extractors) == {"digits-cnn"} else 3


def dataset_of(context: Context, request: ScoreRequest, spec: DatasetSpec | None) -> Dataset | None:
    """Return the dataset; None where there is none, or none is needed and it is not here."""
    if spec is None:
        return None
    try:
        return context.dataset(spec.name)
    except MissingError:
        if request.reference is None:
            raise
        return None


def open_reference(
    context: Context,
    request: ScoreRequest,
    spec: DatasetSpec | None,
    extractor: Extractor,
    metrics: Sequence[str],
    rule: str,
    read: ReadOptions,
    odd: list[str],
) -> Reference:
    """Return what the samples are compared with, from the cache where it is there.

    What was odd about real images that were read is added to ``odd``.
    """
    if request.reference is None:
        assert spec is not None
        return dataset_reference(context, context.dataset(spec.name), extractor, rule)
    if find_run(context, request.reference) is None:
        saved = saved_reference(context, request.reference, extractor)
        if saved is not None:
            saved = with_own_images(context, request, saved, extractor, metrics)
            return saved.to(context.device)
    return images_reference(context, request, request.reference, extractor, rule, read, odd)


def images_reference(
    context: Context,
    request: ScoreRequest,
    given: str,
    extractor: Extractor,
    rule: str,
    read: ReadOptions,
    odd: list[str],
) -> Reference:
    """Return the reference of the images that ``given`` means; their oddities go to ``odd``."""
    options = ReadOptions(channels=read.channels, value_range=read.value_range)
    images = open_source(context, given, options)

    def batches() -> Iterator[Tensor]:
        for batch, _ in images.batches(request.batch_size):
            yield batch

    reference = cached_reference(
        batches,
        extractor,
        source=Path(given).stem,
        quantization=rule,
        folder=context.workspace.cache / "references",
        source_sha256=content_hash(images, request.batch_size),
    )
    odd += images.notes
    return reference.to(context.device)


def open_source(
    context: Context, given: str, options: ReadOptions, nfe: int = 0, dataset: str | None = None
) -> SampleSource:
    """Return the samples that ``given`` means: a run of this harness, an imported checkpoint
    (sampled as ``dataset`` asks), or what others made.
    """
    if given.startswith(PREFIX):
        return open_imported_samples(context, given, dataset, nfe or None, options.seed, options)
    trained = find_run(context, given)
    if trained is None:
        return open_samples(given, options)
    return open_run(context, trained, nfe or None, options.seed, options)


def with_own_images(
    context: Context,
    request: ScoreRequest,
    saved: Reference,
    extractor: Extractor,
    metrics: Sequence[str],
) -> Reference:
    """Add the features of the images that a file of statistics holds, where a metric needs them.

    OpenAI's files have 10,000 images, with which precision, recall and kernel distances compare.
    They are extracted once and kept in the cache.
    """
    path = Path(request.reference or "")
    wanted = any(metric in MANIFOLD or metric in ("kid", "kd") for metric in metrics)
    if not wanted or saved.features is not None or not holds_images(path):
        return saved
    key = replace(saved.key, source=f"{saved.key.source}-with-images")
    kept = context.workspace.cache / "references" / key.file_name
    if kept.is_file():
        return load_reference(kept)
    images = open_samples(str(path), ReadOptions())
    batches = (batch for batch, _ in images.batches(request.batch_size))
    found = with_reference_images(saved, batches, extractor)
    save_reference(found, kept)
    return found


def saved_reference(context: Context, given: str, extractor: Extractor) -> Reference | None:
    """Return reference statistics that ``given`` means, or None if it means images."""
    path = Path(given)
    if path.suffix in _STATISTICS and path.is_file():
        entry = "fd_dinov2" if extractor.name == "dinov2" else "fid"
        return import_reference(path, entry=entry)
    if path.suffix == ".npz" and path.is_file():
        try:
            return import_reference(path)
        except UserError as error:
            if "holds" not in error.problem:
                raise
            return None
    return None if path.exists() or ":" in given else store_of(context).get(given)


def content_hash(source: SampleSource, batch_size: int) -> str:
    """Return a hash of a source's shape, type and pixels in order."""
    digest, head = hashlib.sha256(), ""
    for images, _ in source.batches(batch_size):
        if not head:
            head = f"{tuple(images.shape[1:])}:{images.dtype};"
            digest.update(head.encode())
        digest.update(images.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def census_of(context: Context, request: ScoreRequest, dataset: Dataset | None) -> Census | None:
    """Return what the pixels of real images say, for a reference that is statistics alone.

    Of the images that the file of statistics itself holds (OpenAI's), else of the dataset's; taken
    once and cached. None where nobody has such images.
    """
    path, folder = Path(request.reference or ""), context.workspace.cache / "census"
    if path.is_file() and holds_images(path):
        source = open_samples(str(path), ReadOptions())
        return cached_census(
            lambda: (images for images, _ in source.batches(request.batch_size)),
            folder / f"{sha256_file(path)}.safetensors",
        )
    if dataset is None or dataset.spec.latent:
        return None
    return cached_census(dataset.reference_images, folder / f"{dataset.sha256}.safetensors")


def run(
    context: Context,
    source: SampleSource,
    suites: list[MetricSuite],
    batch_size: int,
    data_shape: Sequence[int],
) -> Evaluation:
    """Evaluate with progress."""
    task = f"score {source.name}"
    began = time.perf_counter()
    context.reporter.task_started(task, task, source.count or 0)

    def progress(count: int) -> None:
        speed = {"images_per_s": count / max(time.perf_counter() - began, 1e-9)}
        context.reporter.task_progress(task, count, speed)

    try:
        with sampling_memory_explained(context.device, batch_size):
            return evaluate(
                source, suites, data_shape=data_shape, batch_size=batch_size, progress=progress
            )
    finally:
        context.reporter.task_finished(task)
