"""What watches a measuring pass: progress, stops, the images that a record keeps, checksums."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cmbench.errors import InterruptedRunError
from cmbench.measure.gallery import save_pngs
from cmbench.measure.loop import Observer
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.quantize import quantize
from cmbench.records.record import FirstSamples
from cmbench.records.reproduction import TOLERANCES
from cmbench.reporter import Reporter
from cmbench.sampling.stream import SampleBatch

#: Images whose checksum a record keeps; `cmbench verify` makes them again.
CHECKED_IMAGES = 256
#: Significant digits of a mean feature in a record.
_DIGITS = 6


class FirstImages:
    """Keeps the first ``count`` images, on the CPU."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._parts: list[Tensor] = []

    def __call__(self, batch: SampleBatch) -> None:
        """Keep what is missing of a batch."""
        missing = self.count - sum(map(len, self._parts))
        if missing > 0:
            self._parts.append(batch.images[:missing].cpu())

    @property
    def images(self) -> Tensor:
        """The images ``[N, C, H, W]`` as they came, N at most ``count``."""
        return torch.cat(self._parts)

    def summary(self, extractor: Extractor, rule: str, precision: str) -> FirstSamples:
        """Return the checksum of the quantized images and the mean of their features.

        Args:
            extractor: of the dataset's protocol; it gets all of them in one batch.
            rule: quantization, see :func:`cmbench.metrics.quantize.quantize`.
            precision: of the sampling network, a key of ``TOLERANCES``.
        """
        pixels = quantize(self.images, rule)
        feature = extractor(pixels).pool.double().mean(0).cpu()
        pixel_tolerance, feature_tolerance = TOLERANCES[precision]
        return FirstSamples(
            count=len(pixels),
            pixels_sha256=hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest(),
            mean_feature=[float(f"{value:.{_DIGITS}g}") for value in feature.tolist()],
            pixel_tolerance=pixel_tolerance,
            feature_tolerance=feature_tolerance,
        )


class PixelDigest:
    """SHA-256 of all images in order, which identifies a set of them.

    ``typed`` puts the shape and type of an image first.
    """

    def __init__(self, *, typed: bool = False) -> None:
        self._digest, self._typed = hashlib.sha256(), typed

    def __call__(self, batch: SampleBatch) -> None:
        """Add a batch."""
        if self._typed:
            self._digest.update(f"{tuple(batch.images.shape[1:])}:{batch.images.dtype};".encode())
            self._typed = False
        self._digest.update(batch.images.contiguous().cpu().numpy().tobytes())

    @property
    def sha256(self) -> str:
        """Hexadecimal digest so far."""
        return self._digest.hexdigest()


def saved_to(folder: Path) -> Observer:
    """Return an observer that writes every image as ``<index>.png``."""
    return lambda batch: save_pngs(batch.images, batch.first, folder)


def stopped_by(should_stop: Callable[[], str | None], who: str, kept: str) -> Observer:
    """Return an observer that raises :class:`InterruptedRunError` once a stop was asked for.

    Args:
        should_stop: returns the reason, or None to go on.
        who: what is interrupted.
        kept: what becomes of the work done so far.
    """

    def observe(batch: SampleBatch) -> None:
        if reason := should_stop():
            remedy = "start the same command again to continue"
            raise InterruptedRunError(who, f"{reason}; {kept}", remedy=remedy)

    return observe


@contextmanager
def progress_of(
    reporter: Reporter, task: str, total: int, seconds: Callable[[], float] | None = None
) -> Iterator[Observer]:
    """Give an observer that reports a task's images and images/s.

    ``seconds`` returns the time to count; None counts wall time.
    """
    began = time.perf_counter()
    count = 0

    def observe(batch: SampleBatch) -> None:
        nonlocal count
        count += len(batch.images)
        spent = seconds() if seconds else time.perf_counter() - began
        reporter.task_progress(task, count, {"images_per_s": count / max(spent, 1e-9)})

    reporter.task_started(task, task, total)
    try:
        yield observe
    finally:
        reporter.task_finished(task)
