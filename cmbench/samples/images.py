"""Samples as image files, in a folder or a zip."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import torch

from cmbench.data.pictures import UNREADABLE, Pixels, decode_picture, unreadable
from cmbench.data.sources.archives import ZipSource
from cmbench.data.sources.base import EncodedSource, ImageIndex, describe_passed_over
from cmbench.data.sources.folder import FolderSource
from cmbench.files import readable
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sampling.stream import SampleBatch

_READERS = 4
#: Pixels of a sample, 4096 x 4096: a folder of larger ones is a mistake, or made to exhaust memory.
_MOST_PIXELS = 1 << 24
#: Decoded bytes of a batch: 250 images of 512 x 512 fit.
_BATCH_BYTES = 1 << 28


class ImageSamples(SampleSource):
    """Images of one size, read by the rule of :mod:`cmbench.data.pictures`."""

    def __init__(self, source: EncodedSource, index: ImageIndex, options: ReadOptions) -> None:
        super().__init__(readable(str(source.path)), options)
        self._source, self._index, self.kind = source, index, source.kind
        if index.passed_over:
            self.notes.append(describe_passed_over(index.passed_over))
        if source.split:
            self.notes.append(f"read the subfolder {source.split!r} of {self.name}")

    @classmethod
    def open(cls, path: Path, options: ReadOptions) -> Self:
        """Read the table of contents; an empty folder is an error."""
        source: EncodedSource = FolderSource(path) if path.is_dir() else ZipSource(path)
        return cls(source, source.index(), options)

    @property
    def count(self) -> int:
        """Number of images."""
        return self.limited(len(self._index))

    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Yield batches in the order of names, of fewer images where they are large."""
        odd: Counter[str] = Counter()
        reader, names, locators = self._source.reader(), self._index.names, self._index.locators
        labels = self._index.labels
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                first = self._decode(names[0], reader.read(locators[0]))[0].shape
                step = max(1, min(batch_size, _BATCH_BYTES // math.prod(first)))
                for start in range(0, self.count, step):
                    stop = min(start + step, self.count)
                    data = [reader.read(locators[i]) for i in range(start, stop)]
                    images = np.empty((stop - start, *first), np.uint8)
                    decoded = pool.map(self._decode, names[start:stop], data)
                    for i, (pixels, notes) in enumerate(decoded):
                        odd.update(notes)
                        self._check_size(first, names[start + i], pixels.shape)
                        images[i] = pixels
                    chosen = None if labels is None else torch.tensor(labels[start:stop])
                    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
                    yield SampleBatch(batch, start, chosen)
        finally:
            reader.close()
            self.notes += [f"{n} of {self.count} samples {what}" for what, n in odd.items()]

    def _check_size(self, first: tuple[int, ...], name: str, shape: tuple[int, ...]) -> None:
        if shape != first:
            raise self.error(
                f"mixed sizes: {self._index.names[0]} is {first[1]}x{first[0]}, {name} is"
                f" {shape[1]}x{shape[0]}",
                allowed="images of one size",
                remedy="score them as they were generated, each size by itself",
            )

    def _decode(self, name: str, data: bytes) -> tuple[Pixels, tuple[str, ...]]:
        try:
            return decode_picture(data, self.options.channels, _MOST_PIXELS)
        except UNREADABLE as error:
            raise unreadable(f"samples {self.name}", name, error) from error
