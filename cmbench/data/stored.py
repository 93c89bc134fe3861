"""Datasets in memory or in a memory map as uint8 ``[N, C, H, W]``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.data.pictures import Pixels
from cmbench.data.streams import ShuffledStream
from cmbench.plugin.method import Batch
from cmbench.plugin.specs import DatasetSpec

Labels = npt.NDArray[np.int64]


def to_float(pixels: Tensor, flips: Tensor | None = None) -> Tensor:
    """Return uint8 ``[N, C, H, W]`` as float32 ``u / 127.5 - 1``, mirrored where ``flips``."""
    if flips is not None:
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


class ArrayDataset(Dataset):
    """uint8 images in CPU memory, in a memory map, or resident on the GPU.

    On the device a batch is a gather and a normalisation there, without a synchronisation.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        pixels: Pixels,
        labels: Labels | None,
        *,
        sha256: str,
        revision: str,
    ) -> None:
        super().__init__(spec, sha256=sha256, revision=revision, size=len(pixels))
        assert pixels.shape[1:] == self.stored_shape, (pixels.shape, self.stored_shape)
        self.host_pixels, self.host_labels = pixels, labels
        if labels is not None and spec.num_classes:
            counts = np.bincount(labels, minlength=spec.num_classes)
            self.class_counts = tuple(int(c) for c in counts)
        self._bind(self.device)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one item of the array."""
        return self.data_shape

    def _bind(self, device: torch.device) -> None:
        self.device = device
        self._stream = ShuffledStream(len(self.host_pixels), device)
        self._pixels = torch.from_numpy(self.host_pixels).to(device)
        labels = self.host_labels
        self._labels = None if labels is None else torch.from_numpy(labels).to(device)

    def to(self, device: torch.device | str) -> Self:
        """Return a copy whose images and labels are resident on ``device``, still as uint8."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved._bind(device)
        return moved

    def batch(self, start: int, count: int, seed: int, *, xflip: bool = False) -> Batch:
        """See :meth:`Dataset.batch`; ``indices`` are positions in the dataset."""
        part = self._stream.take(start, count, seed)
        if self.device.type == "cpu":
            pixels = self.gather(part.indices)
        else:
            pixels = self._pixels.index_select(0, part.indices)
        images = to_float(pixels, part.flips if xflip else None)
        labels = None if self._labels is None else self._labels.index_select(0, part.indices)
        return Batch(images, labels, indices=part.indices)

    def gather(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy the images of ``indices [n]``, as stored, to ``out`` or a new ``[n, C, H, W]``.

        numpy's ``take`` copies row by row, independently of the thread count.
        """
        if out is None:
            return torch.from_numpy(np.take(self.host_pixels, indices.numpy(), axis=0))
        np.take(self.host_pixels, indices.numpy(), axis=0, out=out.numpy(), mode="clip")
        return out

    def reference_images(self, batch_size: int = 500) -> Iterator[Tensor]:
        """Yield all images, uint8, in the order they are stored, on the CPU."""
        for first in range(0, len(self.host_pixels), batch_size):
            yield torch.from_numpy(self.host_pixels[first : first + batch_size])
