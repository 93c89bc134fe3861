"""The record of scored samples: what ``cmbench eval`` was asked for and what it found."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cmbench.data.base import Dataset
from cmbench.errors import UserError
from cmbench.files import readable
from cmbench.measure.loop import Measurement, sample_count_warnings
from cmbench.metrics.memorisation import Memorisation
from cmbench.metrics.reference import Reference
from cmbench.metrics.suite import MetricSuite
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.folders import read_records
from cmbench.records.provenance import environment
from cmbench.records.record import (
    DatasetRecord,
    PluginRecord,
    Record,
    SamplingRecord,
    TrainingRecord,
)
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sweep.cell_record import base_record, dataset_record, metric_record, now
from cmbench.sweep.cells import CellSamples
from cmbench.sweep.context import Context
from cmbench.sweep.plans import SampleSettings

#: The longest name of a row.
MAX_LABEL = 200
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")


#: Opens samples that are in memory, when it is known how to read them.
OpenSamples = Callable[[ReadOptions], SampleSource]


@dataclass(frozen=True)
class ScoreRequest:
    """What ``cmbench eval`` was asked for.

    ``dataset`` gives the protocol and, without ``reference``, the real images. ``reference`` is a
    saved reference, a file of reference statistics, or a source of images. ``nfe`` is 0 where
    it is not stated; of a run, it is what to spend. ``settings`` name the sampler of an imported
    checkpoint and its noise levels. ``held_out`` is a source of real images that
    the generator never saw, for the check of memorised ones.
    """

    samples: str | OpenSamples
    dataset: str | None = None
    reference: str | None = None
    metrics: tuple[str, ...] = ()
    extractor: str | None = None
    weights: Path | None = None
    library: bool = False
    trust: bool = False
    #: Of :data:`cmbench.metrics.values.APPROXIMATIONS`: quicker, another key, never ranked.
    approximations: tuple[str, ...] = ()
    label: str | None = None
    nfe: int = 0
    seed: int = 0
    quantize: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    batch_size: int = 250
    held_out: str | None = None
    settings: SampleSettings | None = None

    def __post_init__(self) -> None:
        if self.label is not None:
            named(self.label)  # raises for what no row can be called, before anything is scored

    def name_of(self, source: SampleSource) -> dict[str, str]:
        """Return what :func:`named` does: for the label, or else for the name of the samples."""
        return named(self.label or Path(source.name.partition(":")[0]).stem)


@dataclass(frozen=True)
class Scored:
    """What an evaluation of samples worked with, and what it found."""

    spec: DatasetSpec | None
    dataset: Dataset | None
    source: SampleSource
    #: The run that makes the samples, if one of this harness does.
    opened: CellSamples | None
    suites: list[MetricSuite]
    found: Measurement
    #: Of the pixels in order: identifies the samples.
    sha256: str
    rule: str
    #: What was odd about the real images.
    notes: tuple[str, ...] = ()
    memorised: Memorisation | None = None

    @property
    def protocol(self) -> int:
        """Samples that the dataset's protocol asks for; as many as there are without one."""
        return self.spec.num_samples if self.spec else self.found.count


def record_of(context: Context, request: ScoreRequest, scored: Scored) -> Record:
    """Return the record; of a run, with everything that is known of its training."""
    found = scored.found
    base = (
        _run_record(context, request, scored, scored.opened)
        if scored.opened is not None
        else _bare_record(context, request, scored)
    )
    keys = "\n".join([scored.sha256, *(m.key for m in found.metrics.values())])
    if scored.memorised is not None:
        keys += f"\nheld out: {scored.memorised.held_out_sha256}"
    digest = hashlib.sha256(keys.encode()).hexdigest()
    rank = next(iter(found.metrics))
    metrics = {n: metric_record(context, n, v) for n, v in found.metrics.items()}
    if scored.memorised is not None:
        detail = {**metrics[rank].detail, "memorisation": asdict(scored.memorised)}
        metrics[rank] = metrics[rank].model_copy(update={"detail": detail})
    warnings = [
        *found.warnings,
        *scored.notes,
        *memorised_warning(scored.memorised),
        *sample_count_warnings(found.count, scored.protocol),
    ]
    if not base.sampling.nfe:
        warnings.append("network evaluations per sample are not known: give them with --nfe")
    record = base.model_copy(
        update={
            "cell": f"{base.method}-n{found.count}-{digest[:10]}",
            "kind": "scored samples" if base.kind == "measured" else base.kind,
            "dataset": _dataset_record(scored),
            "rank_metric": rank,
            "metrics": metrics,
            "copies": scored.suites[0].copies,
            "environment": environment(context.threads, context.gpu),
        }
    )
    return record.model_copy(update={"warnings": [*warnings, *looks_warning(context, record)]})


def memorised_warning(found: Memorisation | None) -> list[str]:
    """Return a warning if samples are nearer to one of the two sets than chance allows."""
    if found is not None and found.reversed:
        return [
            f"only {found.train_share:.1%} of the samples are nearer to a reference image than to a"
            " held-out one (50 % expected): did the generator see the held-out images, or are they"
            " its samples?"
        ]
    if found is None or not found.suspicious:
        return []
    return [
        f"{found.train_share:.1%} of the samples are nearer to a reference image than to a held-out"
        " one (50 % expected): memorised training images?"
    ]


def looks_warning(context: Context, record: Record) -> list[str]:
    """Return a warning if other samples of this row were scored before, under the same seed.

    Every look at a metric is a record; choosing among looks by their value biases the number.
    """
    looks = {
        samples_identity(other)
        for _, other in read_records(context.workspace.records(record.dataset.name))
        if isinstance(other, Record)
        and (other.kind, other.method, other.rank_metric)
        == (record.kind, record.method, record.rank_metric)
        and (other.sampling.nfe, other.sampling.seed) == (record.sampling.nfe, record.sampling.seed)
    } - {samples_identity(record)}
    if not looks:
        return []
    name = record.label or record.method
    return [
        f"{len(looks)} other set(s) of samples named {name!r} were scored here at this NFE and"
        " seed: the best of several looks is biased; choose on other seeds than you report"
    ]


def samples_identity(record: Record) -> tuple[object, ...]:
    """Return what decides which images a record scored; more metrics of them are no other look.

    The run of scored samples is named after their pixels.
    """
    training, sampling = record.training, record.sampling
    made = (sampling.sampler, tuple(sampling.sigmas), sampling.dtype, sampling.num_samples)
    return (training.run, training.checkpoint_sha256, training.ema, *made)


def _run_record(
    context: Context, request: ScoreRequest, scored: Scored, opened: CellSamples
) -> Record:
    """Return the record of samples that a run of this harness made."""
    base = base_record(context, opened.cell, "finished", opened.trained)
    sampling = {
        "nfe_measured": opened.sampler.nfe_measured,
        "num_samples": scored.found.count,
        "protocol_samples": scored.protocol,
        "batch_size": request.batch_size,
        "quantize": scored.rule,
        "seconds": scored.found.seconds,
    }
    if scored.source.options.uniform_labels and base.conditional:
        sampling["labels"] = "uniform over the classes"
    training = {"checkpoint_sha256": opened.weights_sha256}
    return base.model_copy(
        update={
            **named(request.label or base.method),
            "sampling": base.sampling.model_copy(update=sampling),
            "training": base.training.model_copy(update=training),
        }
    )


def _bare_record(context: Context, request: ScoreRequest, scored: Scored) -> Record:
    """Return the record of samples of which nothing else is known."""
    found, source = scored.found, scored.source
    name = request.name_of(source)
    kept_labels = ", ".join(f"{k}: {n}" for k, n in list(found.class_counts.items())[:20])
    return Record(
        cell=name["method"],
        status="finished",
        created=now(),
        command=context.command,
        **name,
        title=f"samples from {source.kind}",
        family="scored samples",
        plugin=PluginRecord(name="scored samples", distribution="none", version=""),
        conditional=bool(found.class_counts),
        dataset=_dataset_record(scored),
        training=TrainingRecord(
            run=f"samples/{scored.sha256[:16]}",
            seed=request.seed,
            recipe="",
            config={},
            config_sha256="",
            parameters=0,
            images_seen=0,
        ),
        sampling=SamplingRecord(
            nfe=request.nfe,
            sampler=source.kind,
            seed=request.seed,
            num_samples=found.count,
            protocol_samples=scored.protocol,
            batch_size=request.batch_size,
            quantize=scored.rule,
            labels=f"counts by class: {kept_labels}" if kept_labels else "",
            seconds=found.seconds,
        ),
        environment=environment(context.threads, context.gpu),
    )


def _dataset_record(scored: Scored) -> DatasetRecord:
    first, reference = scored.suites[0], scored.suites[0].reference
    assert first.extractor is not None
    name = scored.spec.name if scored.spec else reference_page(reference)
    return dataset_record(name, scored.dataset, reference, first.extractor)


def reference_page(reference: Reference | None) -> str:
    """Return the name of the page of samples that were compared with no dataset.

    Never that of a dataset, whatever the reference is called: nothing there was measured under a
    protocol.
    """
    return as_name(f"reference-{reference.key.source}" if reference else "no-reference")


def named(label: str) -> dict[str, str]:
    """Return the fields ``method`` and ``label`` of a record for the name of a row.

    A name that is none of a file is kept as the label; a hash tells its method from that of other
    names that are spelled alike without what no file name has.

    Raises:
        UserError: it is too long, or holds control characters.
    """
    text = readable(label)
    method = as_name(text)
    if method == text:
        return {"method": method}
    if len(text) > MAX_LABEL or any(unicodedata.category(c) == "Cc" for c in text):
        raise UserError(
            "--label",
            f"{text[:60]!r}",
            allowed=f"up to {MAX_LABEL} characters in one line",
            remedy="give another name with --label",
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"method": f"{method}-{digest[:8]}", "label": text}


def as_name(text: str) -> str:
    """Return ``text`` in the alphabet of names."""
    return _NOT_A_NAME.sub("-", text).strip("-._+")[:100] or "samples"
