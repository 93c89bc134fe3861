"""Batches of a memory map for a GPU that cannot hold all of it, read ahead of the step.

A thread gathers the next batch's images into pinned memory and sends them on a stream of its own;
the training step only waits for that copy on the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Batches that wait, read but unused: enough to hide a slow read, few enough to spare memory.
DEPTH = 3


@dataclass(frozen=True)
class Key:
    """A range of positions of one seed's stream."""

    start: int
    count: int
    seed: int


class Staged(NamedTuple):
    """A batch on its way to the device, and the event of its arrival."""

    tensors: tuple[Tensor, ...]
    arrived: Any  #: a ``torch.cuda.Event``, or None


class ReadAhead:
    """Calls ``read(key)`` in a thread for the batches that are needed next.

    The next batch is expected as far onwards as the last one was from the one before. A wrong
    guess costs a wasted read and nothing else.
    """

    def __init__(self, read: Callable[[Key], tuple[Tensor, ...]], device: torch.device) -> None:
        self._read, self.device = read, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cmbench-read-ahead")
        self._waiting: OrderedDict[Key, Future[Staged]] = OrderedDict()
        self._last: Key | None = None
        cuda: Any = torch.cuda  # its streams and events are not typed in every version
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._event: Callable[[], Any] = cuda.Event

    def announce(self, key: Key) -> None:
        """Start to read a batch; the oldest one that was not fetched is dropped."""
        if key in self._waiting:
            return
        while len(self._waiting) >= DEPTH:
            self._waiting.popitem(last=False)[1].cancel()
        self._waiting[key] = self._thread.submit(self._stage, key)

    def fetch(self, key: Key) -> tuple[Tensor, ...]:
        """Return the tensors of a batch on the device; what follows on this stream sees them."""
        self.announce(key)
        staged = self._waiting.pop(key).result()
        self._guess(key)
        if staged.arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(staged.arrived)
            for tensor in staged.tensors:
                tensor.record_stream(current)
        return staged.tensors

    def _guess(self, key: Key) -> None:
        last, self._last = self._last, key
        step = key.count
        if last is not None and (last.count, last.seed) == (key.count, key.seed):
            step = key.start - last.start if key.start > last.start else step
        self.announce(Key(key.start + step, key.count, key.seed))

    def _stage(self, key: Key) -> Staged:
        tensors = self._read(key)
        if self._stream is None:
            return Staged(tuple(t.to(self.device) for t in tensors), None)
        with torch.cuda.stream(self._stream):
            moved = tuple(t.to(self.device, non_blocking=True) for t in tensors)
            arrived = self._event()
            arrived.record(self._stream)
        return Staged(moved, arrived)

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(wait=True, cancel_futures=True)
