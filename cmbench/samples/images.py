"""Samples as image files, in a folder or a zip."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from cmbench.data.preparation.decode import why_undecodable
from cmbench.data.sources.archives import ZipSource
from cmbench.data.sources.base import EncodedSource, ImageIndex
from cmbench.data.sources.folder import FolderSource
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sampling.stream import SampleBatch

LOSSY = frozenset({"JPEG", "MPO", "JPEG2000"})
_READERS = 4


@dataclass(frozen=True)
class Decoded:
    """One image uint8 ``[H, W, C]`` and what was odd about its file."""

    pixels: npt.NDArray[np.uint8]
    oddities: tuple[str, ...]


class ImageSamples(SampleSource):
    """Images of one size, decoded by PIL. JPEG, grey, palette and alpha are said aloud."""

    def __init__(self, source: EncodedSource, index: ImageIndex, options: ReadOptions) -> None:
        super().__init__(str(source.path), options)
        self._source, self._index = source, index
        if source.split:
            self.notes.append(f"read the subfolder {source.split!r} of {source.path}")

    @classmethod
    def open(cls, path: Path, options: ReadOptions) -> Self:
        """Read the table of contents; an empty folder is an error."""
        source: EncodedSource = FolderSource(path) if path.is_dir() else ZipSource(path)
        return cls(source, source.index(), options)

    @property
    def kind(self) -> str:
        """Folder or zip."""
        return self._source.kind

    @property
    def count(self) -> int:
        """Number of images."""
        return self.limited(len(self._index))

    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Yield batches in the order of names."""
        odd: Counter[str] = Counter()
        first: tuple[str, tuple[int, ...]] | None = None
        reader = self._source.reader()
        labels = self._index.labels
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                for start in range(0, self.count, batch_size):
                    stop = min(start + batch_size, self.count)
                    data = [reader.read(self._index.locators[i]) for i in range(start, stop)]
                    names = self._index.names[start:stop]
                    rows = []
                    for name, image in zip(names, pool.map(self._decode, names, data), strict=True):
                        odd.update(image.oddities)
                        first = first or (name, image.pixels.shape)
                        self._check_size(first, name, image.pixels.shape)
                        rows.append(torch.from_numpy(image.pixels))
                    chosen = None if labels is None else torch.tensor(labels[start:stop])
                    images = torch.stack(rows).permute(0, 3, 1, 2).contiguous()
                    yield SampleBatch(images, start, chosen)
        finally:
            reader.close()
            self.notes += [f"{n} of {self.count} samples {what}" for what, n in odd.items()]

    def _check_size(
        self, first: tuple[str, tuple[int, ...]], name: str, shape: tuple[int, ...]
    ) -> None:
        if shape != first[1]:
            raise self.error(
                f"mixed sizes: {first[0]} is {first[1][1]}x{first[1][0]}, {name} is"
                f" {shape[1]}x{shape[0]}",
                allowed="images of one size",
                remedy="score them as they were generated, each size by itself",
            )

    def _decode(self, name: str, data: bytes) -> Decoded:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return self._convert(name, image, lossless=b"VP8L" in data[:64])
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
            raise self.error(
                f"{name} cannot be decoded ({why_undecodable(error)})",
                allowed="whole image files",
                remedy="generate it again, or remove it and all that it stands for",
            ) from error
        except Image.DecompressionBombError as error:
            raise self.error(f"{name} is too large: {error}", allowed="ordinary images") from error

    def _convert(self, name: str, image: Image.Image, *, lossless: bool) -> Decoded:
        odd = []
        if image.format in LOSSY or (image.format == "WEBP" and not lossless):
            odd.append(
                "are JPEG or another lossy format, which changes every distance: save them as PNG"
            )
        mode = image.mode
        if mode in ("P", "PA"):
            odd.append("have a palette (converted to RGB)")
            image = image.convert("RGBA" if "transparency" in image.info or mode == "PA" else "RGB")
        if image.mode in ("RGBA", "LA"):
            alpha = np.asarray(image.getchannel("A"))
            if alpha.min() < 255:
                raise self.error(
                    f"{name} is transparent",
                    allowed="opaque images",
                    remedy="composite it on the background that the data have",
                )
            odd.append("have an opaque alpha channel (dropped)")
            image = image.convert("RGB" if image.mode == "RGBA" else "L")
        wanted = "RGB" if self.options.channels == 3 else "L"
        if image.mode == "L" and wanted == "RGB":
            odd.append("are grey (made RGB by repeating the channel)")
            image = image.convert("RGB")
        if image.mode != wanted:
            raise self.error(
                f"{name} has pixel mode {image.mode}",
                allowed=f"{wanted}, 8 bits a channel",
                remedy=f"save the samples as 8-bit {wanted} PNG",
            )
        pixels = np.array(image, dtype=np.uint8)
        return Decoded(pixels if pixels.ndim == 3 else pixels[:, :, None], tuple(odd))
