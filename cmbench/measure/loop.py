"""The one measuring loop: samples in, metric values and warnings out.

Runs of this harness, imported checkpoints, folders and archives of images, and the search for noise
levels all measure through :func:`measure`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cmbench.metrics.suite import MetricSuite
from cmbench.metrics.values import MetricValue
from cmbench.samples.source import SampleSource, prefetched
from cmbench.sampling.stream import SampleBatch

#: Called with every batch, in order, before it is measured.
Observer = Callable[[SampleBatch], None]


@dataclass(frozen=True)
class Measurement:
    """What was found.

    Args:
        metrics: values by name, in the order of the suites.
        count: number of images.
        shape: channels, height and width of one image.
        class_counts: number of images per requested class; empty without labels.
        warnings: what a reader of the numbers should know.
        stored: whether the images came as bytes, so that no rule turned floats into them here.
        seconds: wall time of the pass over the samples, without computing the metrics.
    """

    metrics: Mapping[str, MetricValue]
    count: int
    shape: tuple[int, int, int]
    class_counts: Mapping[int, int]
    warnings: tuple[str, ...]
    stored: bool
    seconds: float


def measure(
    source: SampleSource,
    suites: Sequence[MetricSuite],
    *,
    batch_size: int,
    data_shape: Sequence[int] = (),
    observers: Sequence[Observer] = (),
) -> Measurement:
    """Read ``source`` once and return every metric of every suite.

    Args:
        source: yields images ``[N, C, H, W]``, uint8 or float in [-1, 1].
        suites: what to compute.
        batch_size: images at a time; does not change the result.
        data_shape: channels, height and width that the samples must have; empty if unknown.
        observers: see every batch before it is measured; what they raise ends the pass.

    Raises:
        UserError: no samples, samples of another size than the data or the reference, a size or
            type that changes midway, or anything that a reader, an extractor or a metric refuses.
    """
    count, shape, stored = 0, (0, 0, 0), False
    began = time.perf_counter()
    batches = source.batches(batch_size)
    for batch in prefetched(batches) if source.read_ahead else batches:
        images = batch.images
        if count == 0:
            shape = (images.shape[1], images.shape[2], images.shape[3])
            stored = images.dtype == torch.uint8
            _require_shape(source, shape, suites, data_shape)
        if tuple(images.shape[1:]) != shape or (images.dtype == torch.uint8) != stored:
            raise source.error(
                f"sample {count} has {_words(images.shape[1:])} {images.dtype}, those before have"
                f" {_words(shape)} {'bytes' if stored else 'floats'}",
                allowed="samples of one size and type",
                remedy="score each kind by itself",
            )
        for observe in observers:
            observe(batch)
        for suite in suites:
            suite.update(images, batch.noise, batch.labels)
        count += len(images)
    if count == 0:
        raise source.error("holds no samples", allowed="at least 2")
    seconds = time.perf_counter() - began
    values: dict[str, MetricValue] = {}
    warnings = list(source.notes)
    for suite in suites:
        values |= suite.finalize()
        warnings += suite.warnings
    counts = suites[0].class_counts if suites else {}
    unique = tuple(dict.fromkeys(warnings))
    return Measurement(values, count, shape, counts, unique, stored, seconds)


def sample_count_warnings(count: int, protocol_count: int) -> list[str]:
    """Return the warning for another number of samples than the protocol asks for."""
    if count == protocol_count:
        return []
    return [
        f"{count} samples instead of the protocol's {protocol_count}: the distance depends on the"
        " count; never ranked with full ones"
    ]


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _require_shape(
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
