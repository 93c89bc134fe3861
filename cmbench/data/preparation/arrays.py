"""Writing a stream of decoded images as blocks of the prepared file. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from cmbench.data.layout import Layout
from cmbench.data.pictures import Pixels
from cmbench.data.preparation.decode import BlockDone, write_all


class ArrayBlocks:
    """Cuts chunks of any length into blocks; writes those that the journal lacks.

    The number of images need not be known: the header is written last.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        done: Mapping[int, BlockDone],
        note: Callable[[BlockDone], None],
    ) -> None:
        self.layout, self.count = layout, 0
        self._done, self._note = dict(done), note
        self._file = os.open(path, os.O_RDWR)
        self._rest: Pixels = np.empty((0, *layout.data_shape), np.uint8)

    def add(self, images: Pixels) -> Iterator[int]:
        """Write whole blocks of images ``[n, C, H, W]``; yield the number written so far."""
        size = self.layout.block_images
        start = 0
        if len(self._rest):
            start = min(size - len(self._rest), len(images))
            self._rest = np.concatenate([self._rest, images[:start]])
            if len(self._rest) < size:
                return
            yield self._write(self._rest)
        stop = start + (len(images) - start) // size * size
        for first in range(start, stop, size):
            yield self._write(images[first : first + size])
        self._rest = images[stop:].copy()

    def _write(self, block: Pixels) -> int:
        number = self.count // self.layout.block_images
        block = np.ascontiguousarray(block)
        digest = hashlib.sha256(block.data).hexdigest()
        if number not in self._done or self._done[number].sha256 != digest:
            write_all(self._file, block, self.layout.offset(self.count))
            self._note(BlockDone(number, digest, {}, False))
        self.count += len(block)
        return self.count

    def __enter__(self) -> ArrayBlocks:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            os.close(self._file)

    def _complete(self) -> None:
        """Write the last, short block and the header."""
        if len(self._rest):
            self._write(self._rest)
            self._rest = self._rest[:0]
        os.ftruncate(self._file, self.layout.offset(self.count))
        os.pwrite(self._file, self.layout.header(self.count), 0)
