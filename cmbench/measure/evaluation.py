"""Score samples: one pass over a source feeds every extractor and every metric."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from cmbench.errors import UserError
from cmbench.metrics.catalog import EXTRACTORS, METRICS
from cmbench.metrics.custom import CustomMetric
from cmbench.metrics.scores import needs
from cmbench.metrics.suite import MetricSuite
from cmbench.metrics.values import MetricValue
from cmbench.samples.source import SampleSource, prefetched

#: Short names of groups of metrics.
GROUPS = {"pr": ("precision", "recall"), "prdc": ("precision", "recall", "density", "coverage")}
#: Extractor of each distance that names one.
EXTRACTOR_OF = {
    "fid": "inception",
    "sfid": "inception",
    "kid": "inception",
    "fid-clean": "inception-clean",
    "fid-legacy-tensorflow": "inception-legacy-tensorflow",
    "fid-legacy-pytorch": "inception-legacy-pytorch",
    "fd-digits": "digits-cnn",
    "fd-dinov2": "dinov2",
    **{f"fd-{spec.name}": spec.name for spec in EXTRACTORS},
}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    ``sha256`` identifies the samples: their pixels in order. ``stored`` says that they came as
    bytes, so that no rule turned floats into them here. ``warnings`` say what a reader of the
    numbers should know.
    """

    metrics: Mapping[str, MetricValue]
    count: int
    sha256: str
    shape: tuple[int, int, int]
    class_counts: Mapping[int, int]
    warnings: tuple[str, ...]
    stored: bool = False


def plan_metrics(
    names: Sequence[str], default: str, custom: Mapping[str, CustomMetric] | None = None
) -> dict[str, list[str]]:
    """Return the metrics asked for by the extractor that computes them.

    Groups ("pr", "prdc") are expanded; what names no extractor (precision, is, kd, a plugin's)
    goes to ``default``.

    Raises:
        UserError: an unknown metric, or no metric.
    """
    metrics = list(dict.fromkeys(chain.from_iterable(GROUPS.get(n, (n,)) for n in names)))
    if not metrics:
        raise UserError("--metrics", "no metric", allowed=", ".join(spec.name for spec in METRICS))
    plan: dict[str, list[str]] = {}
    for metric in metrics:
        if needs(metric, custom) == "flow map":
            raise UserError(
                f"metric {metric!r}",
                "stored samples have no noise to compare with",
                allowed="a metric of features",
                remedy="it is measured by `cmbench run`",
            )
        plan.setdefault(EXTRACTOR_OF.get(metric, default), []).append(metric)
    return plan


def evaluate(
    source: SampleSource,
    suites: Sequence[MetricSuite],
    *,
    data_shape: Sequence[int] = (),
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Read ``source`` once and return every metric of every suite.

    Args:
        source: the samples.
        suites: what to compute.
        data_shape: channels, height and width that the samples must have; empty if unknown.
        batch_size: images at a time.
        progress: called with the number of images so far.

    Raises:
        UserError: no samples, samples of another size than the data or the reference, a size or
            type that changes midway, or anything that a reader, an extractor or a metric refuses.
    """
    digest, count, shape = hashlib.sha256(), 0, (0, 0, 0)
    stored = False
    for images, labels in prefetched(source.batches(batch_size)):
        if count == 0:
            shape = (images.shape[1], images.shape[2], images.shape[3])
            stored = images.dtype == torch.uint8
            _check_shape(source, shape, suites, data_shape)
        if tuple(images.shape[1:]) != shape or (images.dtype == torch.uint8) != stored:
            raise source.error(
                f"sample {count} on: {_words(images.shape[1:])} {images.dtype}, those before were"
                f" {_words(shape)} {'bytes' if stored else 'floats'}",
                allowed="samples of one size and type",
                remedy="score each kind by itself",
            )
        for suite in suites:
            suite.update(images, labels=labels)
        digest.update(images.contiguous().cpu().numpy().tobytes())
        count += len(images)
        progress(count)
    if count == 0:
        raise source.error("holds no samples", allowed="at least 2")
    values: dict[str, MetricValue] = {}
    warnings = list(source.notes)
    for suite in suites:
        values |= suite.finalize()
        warnings += suite.warnings
    return Evaluation(
        metrics=values,
        count=count,
        sha256=digest.hexdigest(),
        shape=shape,
        class_counts=suites[0].class_counts if suites else {},
        warnings=tuple(dict.fromkeys(warnings)),
        stored=stored,
    )


def protocol_warnings(count: int, protocol_count: int) -> list[str]:
    """Return the warning for another number of samples than the protocol asks for."""
    if count == protocol_count:
        return []
    return [
        f"{count} samples instead of the protocol's {protocol_count}: the distance depends on the"
        " count; never ranked with full ones"
    ]


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _check_shape(
    source: SampleSource,
    shape: tuple[int, ...],
    suites: Sequence[MetricSuite],
    data_shape: Sequence[int],
) -> None:
    """Refuse samples of another size than the data or reference images, where that is known."""
    sizes = [("dataset", tuple(data_shape))]
    for suite in suites:
        real = suite.real_census
        sizes.append(("reference", tuple(real.shape) if real else ()))
    for whose, wanted in sizes:
        if wanted and tuple(shape) != wanted:
            raise source.error(
                f"images of {_words(shape)}, the {whose}'s are {_words(wanted)}",
                allowed="samples at the resolution of the reference",
                remedy="score them against a reference of their own size: resizing changes the"
                " distance",
            )
