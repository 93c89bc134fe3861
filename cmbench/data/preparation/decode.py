"""Decoding encoded images into blocks of the prepared file, in this process or in workers.

Everything a worker does: read, decode, crop, transpose, hash, write in place. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from cmbench.data.layout import Layout
from cmbench.data.npy import UNREADABLE, npy_from_bytes
from cmbench.data.sources.base import EncodedSource, ImageIndex, Reader
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
#: Decoded bytes that are handled at a time: they stay in the processor's cache.
_GROUP_BYTES = 192 << 10
#: A block that a worker gets and frees once, untouched, so that it keeps what it frees later.
_KEPT_BYTES = 24 << 20
#: As Pillow refuses by default.
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)
_LOSSY = frozenset({"JPEG", "MPO", "WEBP"})
_MODES = {1: "L", 3: "RGB"}
#: The two formats that large datasets come in, by their first bytes. Opening them directly saves
#: the search through all of Pillow's formats: a fifth of the time of a 32x32 image.
_COMMON: tuple[tuple[bytes, Callable[[BinaryIO], Image.Image]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
)
Array = npt.NDArray[Any]
_GREY = frozenset({"1", "L", "LA", "I", "I;16", "F"})


def why_undecodable(error: BaseException) -> str:
    """Return why Pillow could not decode an image, without its internals."""
    if isinstance(error, UnidentifiedImageError):  # it names our buffer, which tells nothing
        return "UnidentifiedImageError: no image format that Pillow knows"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


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


def require_bytes(image: Image.Image, mode: str) -> None:
    """Raise ``UserError`` if converting a picture to ``mode`` would lose more than colours.

    Pillow clips wide pixels at 255 and drops transparency without a word.
    """
    if image.mode.startswith(("I", "F")):
        raise UserError(
            "image",
            f"has pixels of more than 8 bits (mode {image.mode})",
            allowed="8 bits a channel",
            remedy="scale it to 8 bits first",
        )
    if mode.endswith("A") or not image.has_transparency_data:
        return
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    if isinstance(lowest, (int, float)) and lowest < 255:
        raise UserError(
            "image",
            "is transparent in places",
            allowed="opaque pictures",
            remedy="put it on a background first",
        )


class ImageDecoder:
    """Turns encoded images into rows of a block, and counts what it had to convert."""

    def __init__(self, layout: Layout, transform: str, who: str, *, lossless: bool = False) -> None:
        self.layout, self.who, self.lossless = layout, who, lossless
        channels, self.height, self.width = layout.data_shape
        self.mode = _MODES.get(channels, "")
        self.transform = TRANSFORMS[transform]
        self.converted: dict[str, int] = {}
        self.lossy = False

    def place(self, tall: Image.Image, row: int, data: bytes, name: str) -> None:
        """Decode one image, bring it to the dataset's mode and size, and paste it at ``row``."""
        try:
            image = open_image(data)
            kind = image.format
            if image.mode != self.mode or "transparency" in image.info:
                require_bytes(image, self.mode)
            if image.mode != self.mode:
                self.converted[image.mode] = self.converted.get(image.mode, 0) + 1
                image = image.convert(self.mode)
            if image.size != (self.width, self.height):
                image = self.transform(image, self.width)
            tall.paste(image, (0, row))  # which is when Pillow decodes
        except UserError as error:
            raise self._error(name, error.problem, error.allowed, error.remedy) from None
        except _UNDECODABLE as error:
            raise self._error(
                name,
                f"cannot be decoded ({why_undecodable(error)})",
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

    def array(self, data: bytes, name: str) -> Array:
        """Decode one ``.npy`` to ``[C, H, W]``."""
        shape, dtype = self.layout.data_shape, np.dtype(self.layout.dtype)
        try:
            found = npy_from_bytes(data)
        except UNREADABLE as error:
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
        if not self.mode:
            raise self._error(
                names[0],
                f"cannot have {len(out[0])} channels",
                "1 or 3; .npy arrays may have others",
                "prepare the right source",
            )
        # One tall picture for all of them: parting its channels and getting its bytes costs less
        # than to do that picture by picture.
        tall = Image.new(self.mode, (self.width, self.height * len(names)))
        for i, (name, data) in enumerate(zip(names, datas)):
            self.place(tall, i * self.height, data, name)
        for c, band in enumerate(tall.split()):
            pixels = np.frombuffer(band.tobytes(), np.uint8)
            out[:, c] = pixels.reshape(-1, self.height, self.width)

    def _error(self, name: str, problem: str, allowed: str, remedy: str) -> UserError:
        return UserError(self.who, f"image {name!r} {problem}", allowed=allowed, remedy=remedy)


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image; raises what ``PIL.Image.open`` raises."""
    for magic, opener in _COMMON:
        if data.startswith(magic):
            image = opener(io.BytesIO(data))
            if image.width * image.height > _MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return image
    return Image.open(io.BytesIO(data))


def peek(source: EncodedSource, index: ImageIndex) -> tuple[int, int, int]:
    """Return channels, height and width of a source's first image."""
    name = index.names[0]
    reader = source.reader()
    try:
        data = reader.read(index.locators[0])
        if name.endswith(".npy"):
            shape = npy_from_bytes(data).shape
            if len(shape) == 3:
                return (int(shape[0]), int(shape[1]), int(shape[2]))
            raise ValueError(f"an array of shape {shape}, not [C, H, W]")
        image = open_image(data)
        return (1 if image.mode in _GREY else 3, image.height, image.width)
    except _UNDECODABLE as error:
        raise source.error(
            f"image {name!r} cannot be decoded ({why_undecodable(error)})",
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
        # Kept, since fresh memory for every block would cost a page fault for every picture.
        self.block = np.empty((job.layout.block_images, *job.layout.data_shape), job.layout.dtype)

    def run(self, work: BlockWork) -> BlockDone:
        """Read, decode and write one block."""
        job, layout = self.job, self.job.layout
        decoder = ImageDecoder(layout, job.transform, job.source.who, lossless=job.lossless)
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
        return BlockDone(work.block, digest.hexdigest(), decoder.converted, decoder.lossy)

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
    """Settle this worker's memory; make sure that it dies with its parent, however that ends."""
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
    """Do nothing: the import of this module is what takes time."""


def run_block(job: Job, work: BlockWork) -> BlockDone | Failure:
    """Do one block in a worker; errors return as values, since not all exceptions pickle."""
    try:
        if job.images not in _writers:
            _writers[job.images] = BlockWriter(job)
        return _writers[job.images].run(work)
    except UserError as error:
        return Failure(error.who, error.problem, error.allowed, error.remedy)
