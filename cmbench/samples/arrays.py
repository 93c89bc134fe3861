"""Samples as arrays: OpenAI's sample batches, ``.npz`` and ``.npy``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cmbench.data.npy import Array, map_npy, npz_names, read_npz
from cmbench.errors import UserError
from cmbench.files import readable
from cmbench.samples.source import RANGES, ReadOptions, SampleSource, plain_tensor
from cmbench.sampling.stream import SampleBatch

_IMAGES = ("arr_0", "images", "samples", "x")
_LABELS = ("arr_1", "labels", "label", "y")


class ArraySamples(SampleSource):
    """An array of images: uint8, or floats in a range that the user gives."""

    def __init__(
        self, name: str, images: Array, labels: Array | None, options: ReadOptions, kind: str
    ) -> None:
        super().__init__(name, options)
        self._images, self._labels, self.kind = images, labels, kind
        self.is_ranged = images.dtype.kind == "f"
        self._channels_last = self._layout()
        self._check_type()

    @classmethod
    def open(cls, path: Path, options: ReadOptions) -> Self:
        """Read the file's arrays, never unpickling."""
        if path.suffix.lower() == ".npz":
            held_names = npz_names(path)
            name = next((n for n in _IMAGES if n in held_names), None)
            if name is None:
                held = ", ".join(sorted(held_names)) or "nothing"
                raise cls._refuse(path, f"holds {held}", allowed=f"one of {', '.join(_IMAGES)}")
            labelled = next((n for n in _LABELS if n in held_names), None)
            arrays = read_npz(path, {name, labelled or name}, options.limit)
            labels = arrays[labelled] if labelled else None
            found = cls(readable(str(path)), arrays[name], labels, options, "npz")
            found._tell_chosen(held_names, name, labelled)
            return found
        return cls(readable(str(path)), map_npy(path), None, options, "npy")

    def _tell_chosen(self, held: Sequence[str], images: str, labels: str | None) -> None:
        """Note which arrays were read, where others could have been meant."""
        for what, known, chosen in (("images", _IMAGES, images), ("labels", _LABELS, labels)):
            able = [name for name in known if name in held]
            if others := ", ".join(repr(name) for name in able if name != chosen):
                self.notes.append(f"{what} are read from {chosen!r}; the file also holds {others}")
        if labels is None and len(held) > 1:
            others = ", ".join(sorted(set(held) - {*_IMAGES}))
            if others:
                self.notes.append(f"no labels: none of the arrays {others} is {', '.join(_LABELS)}")

    @staticmethod
    def _refuse(path: Path, problem: str, *, allowed: str) -> UserError:
        return UserError(f"samples {path}", problem, allowed=allowed, remedy="check the file")

    @property
    def count(self) -> int:
        """Number of images."""
        return self.limited(len(self._images))

    def _layout(self) -> bool:
        """Return whether channels come last; raise if the array does not hold images."""
        shape, wanted = self._images.shape, self.options.channels
        who = f"an array of shape {shape}"
        if len(shape) == 3:
            self._images = self._images[..., None]
            shape = self._images.shape
        if len(shape) != 4 or 0 in shape:
            raise self.error(who, allowed="[N, H, W, C] or [N, C, H, W], N > 0")
        if {shape[1], shape[-1]} & {1, 3} == set() and 4 in (shape[1], shape[-1]):
            raise self.error(
                f"{who}: four channels",
                allowed=f"{wanted}",
                remedy="drop the alpha channel, composited on the data's background",
            )
        last, first = shape[-1] in (1, 3), shape[1] in (1, 3)
        if last and first and shape[-1] != shape[1]:
            last, first = shape[-1] == wanted, shape[1] == wanted
        if last == first:
            raise self.error(who, allowed=f"{wanted} channels, second or last")
        return last

    def _check_type(self) -> None:
        dtype = self._images.dtype
        if dtype == np.uint8:
            return
        if dtype.kind != "f":
            raise self.error(
                f"pixels of {dtype}",
                allowed="uint8 in 0 … 255, or floats with --range",
                remedy="store uint8",
            )
        if self.options.value_range is None:
            sample = np.asarray(self._images[: min(len(self._images), 64)], np.float64)
            if not np.isfinite(sample).all():
                raise self.error(
                    "pixels are NaN or infinite",
                    allowed="finite pixels",
                    remedy="the generator diverged: sample again",
                )
            raise self.error(
                f"float pixels from {sample.min():.3g} to {sample.max():.3g}, whose range"
                " is not given",
                allowed="uint8, or floats with --range " + " | ".join(RANGES),
                remedy="give the range; the pixels are then rounded as --quantize says",
            )
        if self.options.value_range not in RANGES:
            raise self.error(f"range {self.options.value_range!r}", allowed=" | ".join(RANGES))
        self.notes.append(
            f"samples are floats in [{self.options.value_range}]: quantized here, not by their"
            " generator"
        )

    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Yield batches in the order of the array."""
        labels = self._checked_labels()
        for start in range(0, self.count, batch_size):
            stop = min(start + batch_size, self.count)
            images = plain_tensor(np.array(self._images[start:stop]))
            if self._channels_last:
                images = images.permute(0, 3, 1, 2).contiguous()
            if images.dtype != torch.uint8:
                images = self._from_floats(images, start)
            kept = None if labels is None else labels[start:stop]
            yield SampleBatch(self._with_channels(images), start, kept)

    def _checked_labels(self) -> Tensor | None:
        labels = self._labels
        if labels is None:
            return None
        if labels.shape != (len(self._images),) or labels.dtype.kind not in "iu":
            self.notes.append(
                f"labels were not read: shape {labels.shape} and {labels.dtype}, where "
                f"{len(self._images):,} images need whole numbers ({len(self._images)},)"
            )
            return None
        found = torch.from_numpy(labels.astype(np.int64))
        classes = self.options.num_classes
        if classes and bool(((found < 0) | (found >= classes)).any()):
            self.notes.append(
                f"labels from {int(found.min())} to {int(found.max())} are not classes of the"
                f" dataset (0 … {classes - 1}): they were not read"
            )
            return None
        return found

    def _from_floats(self, images: Tensor, start: int) -> Tensor:
        assert self.options.value_range is not None
        low, high = RANGES[self.options.value_range]
        images = images.double()
        if not torch.isfinite(images).all():
            bad = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0, 0])
            raise self.error(
                f"image {start + bad} holds NaN or infinite values",
                allowed="finite pixels",
                remedy="the generator diverged: sample again",
            )
        slack = 1e-3 * (high - low)
        found = float(images.min()), float(images.max())
        if found[0] < low - slack or found[1] > high + slack:
            raise self.error(
                f"pixels from {found[0]:.3g} to {found[1]:.3g}, given as"
                f" [{self.options.value_range}]",
                allowed=" | ".join(RANGES),
                remedy="give their range, or clip them",
            )
        return ((images - low) / (high - low) * 2 - 1).float()

    def _with_channels(self, images: Tensor) -> Tensor:
        if images.shape[1] == self.options.channels:
            return images
        if images.shape[1] != 1:
            raise self.error(
                f"{images.shape[1]} channels",
                allowed=str(self.options.channels),
                remedy="store grey images",
            )
        note = "samples are grey (made RGB by repeating the channel)"
        if note not in self.notes:
            self.notes.append(note)
        return images.expand(-1, self.options.channels, -1, -1).contiguous()
