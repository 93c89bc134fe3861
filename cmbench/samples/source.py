"""What a source of samples is: images in batches, a name, and notes about what is unusual."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.sampling.stream import SampleBatch

_T = TypeVar("_T")
#: Value ranges that a user may give for float samples.
RANGES: dict[str, tuple[float, float]] = {"-1,1": (-1.0, 1.0), "0,1": (0.0, 1.0), "0,255": (0, 255)}
#: The kind of a diffusers pipeline.
PIPELINE = "diffusers pipeline"


@dataclass(frozen=True)
class ReadOptions:
    """What a user may have to state about samples.

    Args:
        channels: channels that the extractor expects; 3, or 1 for grey data.
        value_range: a key of :data:`RANGES`, for float samples.
        limit: read at most this many samples.
        uniform_labels: draw classes uniformly, not by the dataset's frequencies, for samplers. A
            sampler of pictures then needs nothing of the dataset but its specification.
        num_classes: classes of the dataset that samples are compared with, 0 if there is none.
        class_names: what they are called, if that is known.
        protocol_samples: how many to make where there is no limit, for generators.
        seed: of the generator, where samples are made.
        steps: network evaluations per sample, for diffusers pipelines.
        device: where a diffusers pipeline runs.
        run_pipeline: whether a diffusers pipeline may be run at all.
    """

    channels: int = 3
    value_range: str | None = None
    limit: int | None = None
    seed: int = 0
    steps: int | None = None
    device: str = "cpu"
    run_pipeline: bool = False
    protocol_samples: int | None = None
    uniform_labels: bool = False
    num_classes: int = 0
    class_names: tuple[str, ...] = ()


@dataclass
class SampleSource(ABC):
    """Samples with a name, a count if it is known, and notes about what is unusual in them."""

    name: str
    options: ReadOptions
    notes: list[str] = field(default_factory=list)
    #: What kind of source it is, in a word or two.
    kind = ""
    #: Whether pixels are floats in the range ``value_range``.
    is_ranged = False
    #: Whether a thread may make the next batch while this one is measured.
    read_ahead = True

    @property
    @abstractmethod
    def count(self) -> int | None:
        """Number of samples, None if it is known only after reading."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Yield all samples in a fixed order.

        Images are uint8, or float in [-1, 1]. ``notes`` are complete when it is exhausted.
        """

    def limited(self, count: int) -> int:
        """Return ``count``, or the limit if that is less."""
        limit = self.options.limit
        return count if limit is None else min(count, limit)

    def error(self, problem: str, *, allowed: str = "", remedy: str = "") -> UserError:
        """Return a ``UserError`` that names this source."""
        return UserError(f"samples {self.name}", problem, allowed=allowed, remedy=remedy)


def plain_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return an array as a tensor, of whatever byte order; long doubles become float64.

    Raises:
        TypeError: a type that torch does not have, such as strings or objects.
    """
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def prefetched(items: Iterator[_T], depth: int = 2) -> Iterator[_T]:
    """Yield ``items`` while a thread makes the next ones, so that reading overlaps extraction."""
    ready: queue.Queue[tuple[bool, object]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: tuple[bool, object]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer((True, item)):
                    return
            offer((False, None))
        except BaseException as error:
            offer((False, error))

    thread = threading.Thread(target=work, daemon=True, name="cmbench-samples")
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join(timeout=5)
