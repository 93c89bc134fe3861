"""Datasets that ``cmbench prepare`` has made: memory-mapped, or resident on the GPU as uint8."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cmbench.data.locations import DataLocations
from cmbench.data.rules import RULES
from cmbench.data.store import MANIFEST, Store, open_store
from cmbench.data.stored import ArrayDataset, to_float
from cmbench.data.streaming import Key, ReadAhead
from cmbench.data.verify import CheckedBlocks
from cmbench.errors import MissingError, UserError
from cmbench.plugin.method import Batch
from cmbench.plugin.specs import DatasetSpec

#: Share of a GPU's memory that a dataset may take for good; a larger one is streamed.
RESIDENT_SHARE = 0.25


def open_prepared(spec: DatasetSpec, locations: DataLocations) -> Store:
    """Open a prepared dataset; say how to prepare it if it is not there."""
    folder = locations.folder(spec.name)
    if not (folder / MANIFEST).exists():
        hint = RULES[spec.name].hint if spec.name in RULES else "what it was made from"
        begun = folder.with_name(f"{folder.name}.partial").exists()
        raise MissingError(
            f"dataset {spec.name!r}",
            f"is {'not completely' if begun else 'not'} prepared in {locations.data_dir}",
            remedy=f"run `cmbench prepare {spec.name} --source PATH`, PATH being {hint}",
        )
    return open_store(folder)


def check_fits(spec: DatasetSpec, store: Store, shape: tuple[int, ...]) -> None:
    """Check that what was prepared is what the spec says."""
    manifest = store.manifest
    if manifest.shape[1:] != shape or manifest.num_classes != spec.num_classes:
        raise UserError(
            f"dataset {spec.name!r}",
            f"{store.folder} holds images {manifest.shape[1:]} of {manifest.num_classes} classes",
            allowed=f"images {shape} of {spec.num_classes} classes",
            remedy=f"run `cmbench prepare {spec.name} --source … --force`",
        )


class PreparedDataset(ArrayDataset):
    """A prepared dataset.

    On the CPU a batch is gathered from the memory map. :meth:`to` keeps the images resident on a
    GPU that has room for them, and reads ahead otherwise. Images are compared with their hashes
    (see :class:`CheckedBlocks`).
    """

    def __init__(self, spec: DatasetSpec, store: Store) -> None:
        self.store = store
        self._ahead: ReadAhead | None = None
        self.spec, self.data_shape = spec, spec.data_shape
        check_fits(spec, store, self.stored_shape)
        self._blocks = CheckedBlocks(store)
        super().__init__(
            spec,
            store.images,
            None if store.labels is None else store.labels.astype("int64"),
            sha256=store.manifest.sha256,
            revision=store.manifest.revision,
        )
        self.class_names = tuple(store.manifest.class_names)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.store.folder

    def to(self, device: torch.device | str, *, resident: bool | None = None) -> Self:
        """Return a copy for ``device``; ``resident`` forces or forbids to upload all images."""
        device = torch.device(device)
        if resident is None:
            resident = device.type == "cpu" or fits_on(device, self.store.images.nbytes)
        if device == self.device and (resident or device.type == "cpu"):
            return self
        moved = copy.copy(self)
        moved._ahead = None
        moved._bind(device if resident else torch.device("cpu"))
        if not resident:
            moved.device = device
            moved._ahead = ReadAhead(moved._read, device)
        return moved

    def _bind(self, device: torch.device) -> None:
        if device.type != "cpu":  # all images are read, in order
            self._blocks.check_range(0, self.store.manifest.count)
        super()._bind(device)

    def gather(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """See :meth:`ArrayDataset.gather`; changed images are an error."""
        self._blocks.check_images(indices.numpy())
        return super().gather(indices, out)

    def reference_images(self, batch_size: int = 500) -> Iterator[Tensor]:
        """See :meth:`ArrayDataset.reference_images`; changed images are an error."""
        first = 0
        for batch in super().reference_images(batch_size):
            self._blocks.check_range(first, first + len(batch))
            first += len(batch)
            yield batch

    def _read(self, key: Key) -> tuple[Tensor, ...]:
        """Gather uint8 images, mirror bits, indices and labels on the host, pinned if that helps.

        ``self._pixels`` stays the memory map and ``self._stream`` on the CPU while streaming.
        """
        part = self._stream.take(key.start, key.count, key.seed)
        pinned = self.device.type == "cuda"
        shape = (key.count, *self._pixels.shape[1:])
        images = self.gather(
            part.indices, torch.empty(shape, dtype=self._pixels.dtype, pin_memory=pinned)
        )
        rest = [part.flips, part.indices]
        if self._labels is not None:
            rest.append(self._labels.index_select(0, part.indices))
        return (images, *(t.pin_memory() if pinned else t for t in rest))

    def batch(self, start: int, count: int, seed: int, *, xflip: bool = False) -> Batch:
        """See :meth:`Dataset.batch`; ``indices`` are positions in the dataset."""
        if self._ahead is None:
            return super().batch(start, count, seed, xflip=xflip)
        images, flips, indices, *labels = self._ahead.fetch(Key(start, count, seed))
        floats = to_float(images, flips if xflip else None)
        return Batch(floats, labels[0] if labels else None, indices=indices)


def fits_on(device: torch.device, nbytes: int) -> bool:
    """Return whether ``nbytes`` are at most :data:`RESIDENT_SHARE` of the device's memory."""
    total: int = torch.cuda.get_device_properties(device).total_memory
    return nbytes <= RESIDENT_SHARE * total


def build(spec: DatasetSpec, locations: DataLocations) -> PreparedDataset:
    """Return a prepared dataset; raises ``MissingError`` with the command that prepares it."""
    return PreparedDataset(spec, open_prepared(spec, locations))
