"""Score samples that somebody else made, and leave a record of the kind ``scored samples``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.measure.extractors import load_extractor, plan_metrics
from cmbench.measure.loop import Observer, measure
from cmbench.measure.observers import PixelDigest, progress_of
from cmbench.metrics.catalog import all_metrics
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.memorisation import Memorisation, memorisation
from cmbench.metrics.metric import OF_REFERENCE, open_metrics
from cmbench.metrics.probe import placed
from cmbench.metrics.quantize import RULES, STORED
from cmbench.metrics.reference import Reference
from cmbench.metrics.suite import MetricSuite
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.record import Record
from cmbench.samples.source import PIPELINE, RANGES, ReadOptions, SampleSource
from cmbench.sampling.stream import SampleBatch
from cmbench.sweep.context import Context
from cmbench.sweep.opened_runs import find_run, run_dataset
from cmbench.sweep.scored_record import Scored, ScoreRequest, record_of
from cmbench.sweep.scored_reference import RealImages, open_source
from cmbench.training.memory import sampling_memory_explained


def score(context: Context, request: ScoreRequest) -> Record:
    """Evaluate samples and return their record; everything cheap is checked before any work.

    Raises:
        UserError: anything about the samples, the reference, the weights or the metrics that
            cannot be.
    """
    request, spec, known = dataset_asked(context, request)
    rule = request.quantize or (known.quantize if known else "round")
    if rule not in RULES:
        raise unknown_name("--quantize", "quantization rule", rule, RULES)
    plan = plan_of(context, request, known)
    size = known.data_shape if known is not None and not known.latent else ()
    extractors = open_extractors(context, request, plan, size)
    channels = channels_of(known, extractors)
    dataset = dataset_of(context, request, spec)
    read = reading(request, known, channels, dataset.class_names if dataset is not None else ())
    asked = (request.nfe, request.dataset, request.settings)
    source, opened = open_source(context, request.samples, read, *asked)
    require_read(request, source)
    real = RealImages(context, request, spec, rule, channels)
    suites = [
        open_suite(context, real, dataset, extractors[name], metrics)
        for name, metrics in plan.items()
    ]
    unseen = None
    if request.held_out is not None:
        require_features(suites[0].reference)
        unseen = real.of_images(request.held_out, next(iter(extractors.values())))
    digest, total = PixelDigest(), source.count or 0
    with (
        sampling_memory_explained(context.device, request.batch_size),
        progress_of(context.reporter, f"score {source.name}", total) as progress,
    ):
        watched: list[Observer] = [refusal_of_bytes(known, source), digest, progress]
        found = measure(
            source, suites, batch_size=request.batch_size, data_shape=size, observers=watched
        )
    if found.stored and request.quantize is None:
        rule = STORED
    copied = None if unseen is None else check_memorised(suites[0], unseen)
    notes = tuple(f"reference: {note}" for note in dict.fromkeys(real.notes))
    scored = Scored(
        spec, dataset, source, opened, suites, found, digest.sha256, rule, notes, copied
    )
    return record_of(context, request, scored)


def dataset_asked(
    context: Context, request: ScoreRequest
) -> tuple[ScoreRequest, DatasetSpec | None, DatasetSpec | None]:
    """Return the request, the dataset to compare with, and the one that says what samples are.

    A run is compared with its own dataset if nothing else is named; and it says by its dataset what
    its samples are, whatever they are compared with.
    """
    given = request.samples
    trained = find_run(context, given) if isinstance(given, str) else None
    own = run_dataset(trained) if trained is not None else None
    if own is not None and request.dataset is None and request.reference is None:
        request = replace(request, dataset=own)
    spec = context.dataset_spec(request.dataset, "cmbench eval") if request.dataset else None
    if spec is None and request.reference is None:
        raise UserError(
            "cmbench eval",
            "nothing to compare with",
            allowed="--dataset or --reference",
            remedy="name a dataset, or give real images or reference statistics",
        )
    return request, spec, spec or (context.dataset_spec(own) if own is not None else None)


def open_suite(
    context: Context,
    real: RealImages,
    dataset: Dataset | None,
    extractor: Extractor,
    metrics: Sequence[str],
) -> MetricSuite:
    """Return the suite of the metrics that one extractor serves."""
    opened = open_metrics(context.plugins, metrics)
    needs = {need for metric in opened for need in metric.needs}
    reference = census = None
    if real.spec is not None or not needs.isdisjoint(OF_REFERENCE):
        reference = real.reference(extractor, opened)
        census = real.census(dataset) if reference.census is None else None
    return MetricSuite(
        opened,
        extractor=extractor,
        reference=reference,
        quantization=real.rule,
        class_counts=dataset.class_counts if dataset is not None else (),
        census=census,
        rule_of_bytes=real.request.quantize or STORED,
    )


def open_extractors(
    context: Context, request: ScoreRequest, plan: Mapping[str, Sequence[str]], size: Sequence[int]
) -> dict[str, Extractor]:
    """Return the extractors of a plan on the context's device, for images of ``size``."""
    return {
        name: placed(
            load_extractor(
                context.plugins,
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


def reading(
    request: ScoreRequest, known: DatasetSpec | None, channels: int, class_names: tuple[str, ...]
) -> ReadOptions:
    """Return how samples are read; raise ``UserError`` for a range that does not exist."""
    given = request.read.value_range
    if given is not None and given not in RANGES:
        raise UserError("--range", f"{given!r}", allowed=" | ".join(RANGES))
    return replace(
        request.read,
        channels=channels,
        protocol_samples=known.num_samples if known else None,
        num_classes=known.num_classes if known else 0,
        class_names=class_names,
    )


def refusal_of_bytes(known: DatasetSpec | None, source: SampleSource) -> Observer:
    """Return what refuses bytes as samples of data that are not quantised, such as points."""

    def observe(batch: SampleBatch) -> None:
        bytes_ = not batch.images.is_floating_point()
        if known is not None and known.quantize == "none" and not known.latent and bytes_:
            raise source.error(
                f"are bytes, and the values of dataset {known.name!r} are not",
                allowed="floats in the data's own units",
                remedy="give a .npy or .npz of floats, or a generator",
            )

    return observe


def require_read(request: ScoreRequest, source: SampleSource) -> None:
    """Raise ``UserError`` for options that samples do not take, and for names that no row has."""
    request.name_of(source)
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
    return reference.require_features("memorisation")


def check_memorised(suite: MetricSuite, unseen: Reference) -> Memorisation:
    """Compare the samples' nearest real images with held-out ones."""
    samples, train = suite.samples.pool, require_features(suite.reference)
    assert samples is not None
    found = memorisation(samples, train, require_features(unseen).to(train.device))
    return replace(found, held_out_sha256=unseen.key.source_sha256)


def plan_of(
    context: Context, request: ScoreRequest, spec: DatasetSpec | None
) -> dict[str, list[str]]:
    """Return the metrics by extractor; the protocol's where none were asked for."""
    default = request.extractor or (spec.extractor if spec else "inception")
    asked, known = request.metrics, all_metrics(context.plugins)
    if not asked and spec is not None:
        asked = tuple(m for m in spec.metrics if m not in known or "flow map" not in known[m].needs)
    plan = plan_metrics(asked or ("fid", "is", "pr", "kid"), default, context.plugins)
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
    channels = {getattr(x, "image_shape", (3,))[0] for x in extractors.values()}
    return int(channels.pop()) if len(channels) == 1 else 3


def dataset_of(context: Context, request: ScoreRequest, spec: DatasetSpec | None) -> Dataset | None:
    """Return the dataset; None where there is none, or none is needed and it is not here."""
    if spec is None:
        return None
    try:
        return context.dataset(spec.name)
    except MissingError:
        if request.reference is None:
            raise  # before the reference is opened, which takes longer
        return None
