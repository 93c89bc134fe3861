"""Samples as image files, in a folder or a zip."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import torch

from cmbench.data.pictures import UNREADABLE, Pixels, decode_picture, unreadable
from cmbench.data.sources.archives import ZipSource
from cmbench.data.sources.base import EncodedSource, ImageIndex, describe_passed_over
from cmbench.data.sources.folder import FolderSource
from cmbench.errors import first_names
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
        self.notes += index.notes
        if source.split:
            self.notes.append(f"read the subfolder {source.split!r} of {self.name}")
        self._labels = self._class_numbers()

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
        labels = self._labels
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

    def _class_numbers(self) -> Sequence[int] | None:
        """Return the labels, those of class folders as the dataset numbers its classes.

        A folder is a class by its name or, where the names of the dataset's classes are not known,
        by its number without leading zeros. As many other folders as there are classes are then
        numbered in sorted order, as the dataset's own are. Folders of which none is a class are not
        labels.
        """
        labels, folders, options = self._index.labels, self._index.class_names, self.options
        count, known = options.num_classes, options.class_names
        if labels is None or not folders or not count:
            return labels
        numbers = {name: i for i, name in enumerate(known)}
        numbers |= {str(i): i for i in range(count) if not known}
        others = [name for name in folders if name not in numbers]
        if not others:
            return [numbers[folders[label]] for label in labels]
        told = f"folders whose names are not classes of the dataset: {first_names(others, 5)}"
        if len(others) == len(folders):
            if not known and len(folders) == count:
                self.notes.append("class folders are numbered in sorted order")
                return labels
            self.notes.append(f"{told}; labels were not read")
            return None
        raise self.error(
            told,
            allowed=first_names(list(numbers), 10),
            remedy="name each folder by its class, or put all images into one folder",
        )

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
