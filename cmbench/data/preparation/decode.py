"""Decoding encoded images into blocks of the prepared file, in this process or in workers.

Everything a worker does: read, decode, crop, transpose, hash, write in place. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from cmbench.data.sources.base import EncodedSource, Index, Reader
from cmbench.data.store import Array, Layout
from cmbench.data.transforms import TRANSFORMS
from cmbench.errors import UserError

_UNDECODABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
)
_LOSSY = frozenset({"JPEG", "MPO", "WEBP"})
_MODES = {1: "L", 3: "RGB"}
_GREY = frozenset({"1", "L", "LA", "I", "I;16", "F"})


@dataclass(frozen=True)
class Job:
    """What is the same for all blocks of a dataset."""

    source: EncodedSource
    layout: Layout
    transform: str
    count: int
    images: Path
    lossless: bool


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


class Failure(NamedTuple):
    """A ``UserError`` in a form that passes between processes."""

    who: str
    problem: str
    allowed: str
    remedy: str

    def error(self) -> UserError:
        """Return the error."""
        return UserError(self.who, self.problem, allowed=self.allowed, remedy=self.remedy)


class ImageDecoder:
    """Turns encoded images into rows of a block, and counts what it had to convert."""

    def __init__(self, layout: Layout, transform: str, who: str, *, lossless: bool = False) -> None:
        self.layout, self.who, self.lossless = layout, who, lossless
        channels, self.height, self.width = layout.data_shape
        self.mode = _MODES.get(channels, "")
        self.transform = TRANSFORMS[transform]
        self.converted: dict[str, int] = {}
        self.lossy = False

    def pixels(self, data: bytes, name: str) -> Array:
        """Decode one image to ``[H, W, C]`` (``[H, W]`` for one channel)."""
        try:
            opened = Image.open(io.BytesIO(data))
            image: Image.Image = opened
            kind = opened.format
            if image.mode != self.mode:
                self.converted[image.mode] = self.converted.get(image.mode, 0) + 1
                image = image.convert(self.mode)
            if image.size != (self.width, self.height):
                image = self.transform(image, self.width)
            pixels = np.asarray(image)
        except UserError as error:
            raise self._error(name, error.problem, error.allowed, error.remedy) from None
        except _UNDECODABLE as error:
            detail = " ".join(str(error).split())[:120]
            raise self._error(
                name,
                f"cannot be decoded ({type(error).__name__}: {detail})",
                "",
                "replace the file, or download the source again",
            ) from None
        if kind in _LOSSY:
            self.lossy = True
            if self.lossless:
                raise self._error(
                    name,
                    f"is {kind}, which is lossy",
                    "PNG or another lossless format",
                    "lossy pictures are another dataset: for CIFAR-10, prepare cifar10-jpeg",
                )
        return pixels

    def array(self, data: bytes, name: str) -> Array:
        """Decode one ``.npy`` to ``[C, H, W]``."""
        shape, dtype = self.layout.data_shape, np.dtype(self.layout.dtype)
        try:
            found: Array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
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
        return found

    def block(self, names: Sequence[str], datas: Sequence[bytes]) -> Array:
        """Decode a block to contiguous ``[n, C, H, W]``."""
        channels, height, width = self.layout.data_shape
        if self.layout.dtype != "uint8" or (names and names[0].endswith(".npy")):
            return np.stack([self.array(d, n) for n, d in zip(names, datas)])
        rows = np.empty((len(names), height, width, channels), np.uint8)
        flat = rows[..., 0] if channels == 1 else rows
        for i, (name, data) in enumerate(zip(names, datas)):
            flat[i] = self.pixels(data, name)
        return np.ascontiguousarray(rows.transpose(0, 3, 1, 2))

    def _error(self, name: str, problem: str, allowed: str, remedy: str) -> UserError:
        return UserError(self.who, f"image {name!r} {problem}", allowed=allowed, remedy=remedy)


def peek(source: EncodedSource, index: Index) -> tuple[int, int, int]:
    """Return channels, height and width of a source's first image."""
    name = index.names[0]
    reader = source.reader()
    try:
        data = reader.read(index.locators[0])
        if name.endswith(".npy"):
            shape = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).shape
            if len(shape) == 3:
                return (int(shape[0]), int(shape[1]), int(shape[2]))
            raise ValueError(f"an array of shape {shape}, not [C, H, W]")
        image = Image.open(io.BytesIO(data))
        return (1 if image.mode in _GREY else 3, image.height, image.width)
    except _UNDECODABLE as error:
        detail = " ".join(str(error).split())[:120]
        raise source.error(
            f"image {name!r} cannot be decoded ({type(error).__name__}: {detail})",
            remedy="replace the file, or remove it",
        ) from None
    finally:
        reader.close()


class BlockWriter:
    """Does the blocks of one job; keeps source and target open between them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.reader: Reader = job.source.reader()
        self.file = os.open(job.images, os.O_RDWR)

    def run(self, work: BlockWork) -> BlockDone:
        """Read, decode and write one block."""
        job = self.job
        decoder = ImageDecoder(job.layout, job.transform, job.source.who, lossless=job.lossless)
        datas = []
        for name, locator in zip(work.names, work.locators):
            try:
                datas.append(self.reader.read(locator))
            except OSError as error:
                raise UserError(
                    job.source.who,
                    f"image {name!r} cannot be read: {error.strerror or error}",
                    remedy="restore the file and run the same command again to resume",
                ) from None
        block = decoder.block(work.names, datas)
        first, _ = job.layout.block_range(work.block, job.count)
        write_all(self.file, block, job.layout.offset(first))
        digest = hashlib.sha256(block.data).hexdigest()
        return BlockDone(work.block, digest, decoder.converted, decoder.lossy)

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
    """Make sure that this worker dies with its parent, even if that is killed."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def warm_up() -> None:
    """Do nothing: the import of this module is what takes time."""


def run_block(job: Job, work: BlockWork) -> BlockDone | Failure:
    """Do one block in a worker; errors return as values, since not all exceptions pickle."""
    try:
        if job.images not in _writers:
            _writers[job.images] = BlockWriter(job)
        return _writers[job.images].run(work)
    except UserError as error:
        return Failure(error.who, error.problem, error.allowed, error.remedy)
