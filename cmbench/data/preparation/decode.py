"""Decoding encoded images into blocks of the prepared file, in this process or in workers.

Everything a worker does: read, decode, crop, transpose, hash, write in place. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cmbench.data import npy
from cmbench.data.layout import Layout
from cmbench.data.npy import Array
from cmbench.data.pictures import UNREADABLE, PictureError, mode_of, open_picture, unreadable
from cmbench.data.sources.base import EncodedSource, Reader
from cmbench.data.transforms import TRANSFORMS
from cmbench.errors import UserError

#: Decoded bytes that are handled at a time: they stay in the processor's cache.
_GROUP_BYTES = 192 << 10
#: A block that a worker gets and frees once, untouched, so that it keeps what it frees later.
_KEPT_BYTES = 24 << 20


@dataclass(frozen=True)
class DecodingJob:
    """What is the same for all blocks of a dataset."""

    source: EncodedSource
    layout: Layout
    transform: str
    count: int
    images: Path
    lossless: bool
    upright: bool


class BlockWork(NamedTuple):
    """One block: which images, and where they are in the source."""

    block: int
    names: Sequence[str]
    locators: Sequence[Any]


class BlockDone(NamedTuple):
    """What a finished block leaves."""

    block: int
    sha256: str
    converted: dict[str, int]
    lossy: bool


class ImageDecoder:
    """Turns encoded images into rows of a block, and counts what it had to convert."""

    def __init__(self, job: DecodingJob) -> None:
        self.layout, self.who = job.layout, job.source.who
        self.lossless, self.upright = job.lossless, job.upright
        self.channels, self.height, self.width = job.layout.data_shape
        self.transform = TRANSFORMS[job.transform]
        self.converted: Counter[str] = Counter()
        self.lossy = False

    def place(self, tall: Image.Image, row: int, data: bytes, name: str) -> None:
        """Decode one image, bring it to the dataset's mode and size, and paste it at ``row``."""
        try:
            image, lossy, notes = open_picture(data, self.channels, upright=self.upright)
            if lossy and self.lossless:
                raise PictureError(
                    f"is {lossy}, which is lossy",
                    allowed="PNG or another lossless format",
                    remedy="lossy pictures are another dataset: for CIFAR-10, prepare cifar10-jpeg",
                )
            if image.size != (self.width, self.height):
                image = self.transform(image, self.width)
            tall.paste(image, (0, row))  # which is when Pillow decodes
        except UNREADABLE as error:
            raise unreadable(self.who, name, error) from None
        self.lossy = self.lossy or bool(lossy)
        if notes:
            self.converted.update(notes)

    def array(self, data: bytes, name: str) -> Array:
        """Decode one ``.npy`` to ``[C, H, W]``."""
        shape, dtype = self.layout.data_shape, np.dtype(self.layout.dtype)
        try:
            found = npy.npy_from_bytes(data)
        except npy.UNREADABLE as error:
            raise self._error(
                name, f"cannot be read ({error})", "", "download the source again"
            ) from None
        if found.shape != shape or found.dtype != dtype:
            raise self._error(
                name,
                f"holds {found.dtype} {found.shape}",
                f"{dtype} {shape}",
                "prepare the right source",
            )
        if dtype.kind == "f" and not np.isfinite(found).all():
            raise self._error(
                name, "holds NaN or infinite values", "finite numbers", "download the source again"
            )
        return found

    def fill(self, out: Array, names: Sequence[str], datas: Sequence[bytes]) -> None:
        """Decode images into ``out [n, C, H, W]``."""
        if self.layout.dtype != "uint8" or names[0].endswith(".npy"):
            for i, (name, data) in enumerate(zip(names, datas)):
                out[i] = self.array(data, name)
            return
        try:
            mode = mode_of(self.channels)
        except PictureError as error:
            raise unreadable(self.who, names[0], error) from None
        # One tall picture for all of them: splitting its channels and getting its bytes costs
        # less than doing that picture by picture.
        tall = Image.new(mode, (self.width, self.height * len(names)))
        for i, (name, data) in enumerate(zip(names, datas)):
            self.place(tall, i * self.height, data, name)
        for c, band in enumerate(tall.split()):
            pixels = np.frombuffer(band.tobytes(), np.uint8)
            out[:, c] = pixels.reshape(-1, self.height, self.width)

    def _error(self, name: str, problem: str, allowed: str, remedy: str) -> UserError:
        return UserError(self.who, f"image {name!r} {problem}", allowed=allowed, remedy=remedy)


class BlockWriter:
    """Does the blocks of one job; keeps source and target open between them."""

    def __init__(self, job: DecodingJob) -> None:
        self.job = job
        self.reader: Reader = job.source.reader()
        self.file = os.open(job.images, os.O_RDWR)
        # Kept, since fresh memory for every block would cost a page fault for every picture.
        self.block = np.empty((job.layout.block_images, *job.layout.data_shape), job.layout.dtype)

    def run(self, work: BlockWork) -> BlockDone:
        """Read, decode and write one block."""
        job, layout = self.job, self.job.layout
        decoder = ImageDecoder(job)
        digest = hashlib.sha256()
        block = self.block[: len(work.names)]
        step = max(1, _GROUP_BYTES // layout.image_bytes)
        for start in range(0, len(block), step):
            part = slice(start, start + step)
            datas = [self.read(n, k) for n, k in zip(work.names[part], work.locators[part])]
            decoder.fill(block[part], work.names[part], datas)
            digest.update(block[part].data)
        first, _ = layout.block_range(work.block, job.count)
        write_all(self.file, block, layout.offset(first))
        return BlockDone(work.block, digest.hexdigest(), dict(decoder.converted), decoder.lossy)

    def read(self, name: str, locator: Any) -> bytes:
        """Read one encoded image."""
        try:
            return self.reader.read(locator)
        except OSError as error:
            raise UserError(
                self.job.source.who,
                f"image {name!r} cannot be read: {error.strerror or error}",
                remedy="restore the file and run the same command again to resume",
            ) from None

    def close(self) -> None:
        """Close source and target."""
        self.reader.close()
        os.close(self.file)


def write_all(file: int, block: Array, offset: int) -> None:
    """Write a contiguous block at ``offset``, however many calls it takes."""
    view = memoryview(block.data).cast("B")
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


# ---- in worker processes -----------------------------------------------------------------------

_writers: dict[Path, BlockWriter] = {}


def start_worker() -> None:
    """Set up this worker's memory; make sure that it ends with its parent."""
    # glibc raises its limit for keeping freed memory to the largest block that was ever freed. In a
    # fresh process that limit is low, and every picture's buffers would go back to the system.
    bytes(_KEPT_BYTES)
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def warm_up() -> None:
    """Do nothing: importing this module is what takes time."""


def run_block(job: DecodingJob, work: BlockWork) -> BlockDone:
    """Do one block in a worker."""
    if job.images not in _writers:
        _writers[job.images] = BlockWriter(job)
    return _writers[job.images].run(work)
