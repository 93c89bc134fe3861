"""A value that others published, measured again under their settings, and what may be claimed.

A checkpoint's value has sampling noise, theirs as well as ours: both sets have the same number of
images, so the difference has sqrt(2) times our standard error. An archive holds the very samples
that were scored, so the values of two correct evaluators differ by their arithmetic alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cmbench.importers.public import PublicCheckpoint
from cmbench.metrics.catalog import METRICS
from cmbench.metrics.reference import ANY
from cmbench.metrics.reference_import import PUBLISHED
from cmbench.records.record import Record
from cmbench.samples.source import ReadOptions
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.scored_record import ScoreRequest

#: Standard errors of the difference within which two values agree.
BOUND = 2.0
#: Relative difference that two evaluators may have on the same images. A port of OpenAI's
#: evaluator to PyTorch differs by 8e-4 in FID (openai/guided-diffusion, issue 159).
SAME_IMAGES = 1e-3
REPRODUCED, NOT_REPRODUCED, NOT_CLAIMED = "reproduced", "not reproduced", "not claimed"


@dataclass(frozen=True)
class PublishedComparison:
    """One metric: ours, theirs, and whether they agree.

    Attributes:
        metric: its name here.
        value: ours.
        published: theirs.
        standard_error: of the difference; None where it is not known.
        in_standard_errors: the difference in that unit.
        agrees: None where neither a standard error nor the same images decide it.
    """

    metric: str
    value: float | None
    published: float
    standard_error: float | None
    in_standard_errors: float | None
    agrees: bool | None


def measured_metrics(row: PublicCheckpoint, *, verified: bool) -> dict[str, str]:
    """Return by metric of a row what it is called here.

    With weights that are not the published ones a distance is not called FID.
    """
    specs = {spec.name: spec for spec in METRICS}
    names = {}
    for metric in row.metrics.split():
        spec = specs[metric]
        names[metric] = metric
        if not verified and spec.family in ("fd", "sfd") and spec.extractors[0].startswith("fid"):
            extractor = spec.extractors[0].replace("fid", "inception", 1)
            names[metric] = f"{spec.family}-{extractor}-unverified"
    return names


def request_of(
    row: PublicCheckpoint, samples: str, reference: str, seed: int, *, verified: bool = True
) -> ScoreRequest:
    """Return the evaluation of ``samples`` under the settings that a row of the list states.

    ``verified``: whether the extractor's weights are the published ones.
    """
    sigmas = tuple(map(float, row.sigmas.split())) or None
    return ScoreRequest(
        samples=samples,
        dataset=None if row.is_archive else row.dataset,
        reference=reference,
        metrics=tuple(measured_metrics(row, verified=verified).values()),
        label=row.name,
        nfe=int(row.nfe or 0),
        seed=seed,
        quantize=row.quantize or None,
        read=ReadOptions(limit=int(row.samples), seed=seed, uniform_labels=not row.is_archive),
        settings=SampleSettings(sampler=row.sampler or None, sigmas=sigmas),
    )


def compared(row: PublicCheckpoint, record: Record) -> list[PublishedComparison]:
    """Compare a record's values with those of a row of the list."""
    names = measured_metrics(row, verified=has_published_weights(record))
    found = []
    for listed, (published, rounding) in row.values.items():
        metric = names[listed]
        value = record.metrics[metric].value
        own = record.metrics[metric].standard_error
        error = None if own is None else own * (1.0 if row.is_archive else math.sqrt(2))
        ratio = (value - published) / error if value is not None and error else None
        slack = SAME_IMAGES * abs(published) if row.is_archive else None
        if slack is None and error is not None:
            slack = BOUND * error
        decided = value is not None and slack is not None
        agrees = abs(value - published) <= slack + rounding if decided else None  # type: ignore
        found.append(PublishedComparison(metric, value, published, error, ratio, agrees))
    return found


def has_published_weights(record: Record) -> bool:
    """Return whether a record's extractor is known to have the published weights."""
    known = PUBLISHED.get(record.dataset.extractor, (ANY, ""))[0]
    return known != ANY and record.dataset.extractor_sha256.startswith(known)


def doubts_of(row: PublicCheckpoint, record: Record) -> list[str]:
    """Return why values of a record are not those of the published setting."""
    doubts = []
    count = record.sampling.num_samples
    if count != int(row.samples):
        doubts.append(f"{count:,} samples instead of {int(row.samples):,}")
    if not has_published_weights(record):
        doubts.append("the extractor's weights are not known to be the published ones")
    if "UNVERIFIED" in row.settings_in:
        doubts.append("settings are UNVERIFIED in the list")
    return doubts


def verdict_of(comparisons: Sequence[PublishedComparison], doubts: Sequence[str]) -> str:
    """Return the verdict; with doubts nothing is claimed, whatever the values are."""
    agree = [one.agrees for one in comparisons]
    if doubts or None in agree:
        return NOT_CLAIMED
    return REPRODUCED if all(agree) else NOT_REPRODUCED


def with_verdict(
    record: Record,
    row: PublicCheckpoint,
    comparisons: Sequence[PublishedComparison],
    doubts: Sequence[str],
) -> Record:
    """Return the record with the comparison in its metrics' details, and with warnings of doubts.

    What was compared is part of the cell's identity: a stand-in's record is never taken for that
    of the published files.
    """
    verdict = verdict_of(comparisons, doubts)
    told = {"name": row.name, "url": row.url, "verdict": verdict, "doubts": list(doubts)}
    metrics = dict(record.metrics)
    for one in comparisons:
        compared_with = {**told, **asdict(one)}
        metric = metrics[one.metric]
        detail = {**metric.detail, "published": compared_with}
        metrics[one.metric] = metric.model_copy(update={"detail": detail})
    warnings = list(record.warnings)
    if verdict == NOT_CLAIMED:
        why = "; ".join(doubts) or "a metric has no standard error"
        warnings.append(f"this does not count as a reproduction of {row.name}: {why}")
    identity = "\n".join([record.cell, row.published, *doubts])
    cell = f"{record.cell}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}"
    return record.model_copy(update={"cell": cell, "metrics": metrics, "warnings": warnings})
