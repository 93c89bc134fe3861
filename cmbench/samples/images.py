"""Samples as image files, in a folder or a zip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch

from cmbench.data.pictures import UNREADABLE, Pixels, decode_picture, unreadable
from cmbench.data.sources.archives import ZipSource
from cmbench.data.sources.base import EncodedSource, ImageIndex, describe_passed_over
from cmbench.data.sources.folder import FolderSource
from cmbench.files import readable
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sampling.stream import SampleBatch

_READERS = 4


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
                    decoded = pool.map(self._decode, names, data)
                    for name, (pixels, notes) in zip(names, decoded, strict=True):
                        odd.update(notes)
                        first = first or (name, pixels.shape)
                        self._check_size(first, name, pixels.shape)
                        rows.append(torch.from_numpy(pixels))
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

    def _decode(self, name: str, data: bytes) -> tuple[Pixels, tuple[str, ...]]:
        try:
            return decode_picture(data, self.options.channels)
        except UNREADABLE as error:
            raise unreadable(f"samples {self.name}", name, error) from error
