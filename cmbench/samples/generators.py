"""Samples from a Python entry point.

An entry point ``module:function`` is called as ``function(indices, seed)`` with int64 sample
numbers ``[N]`` and the seed, and returns images ``[N, C, H, W]``, uint8 or float in [-1, 1], as a
tensor or a NumPy array, or a pair of images and int64 labels ``[N]``. Image i must depend on
(seed, i) only; that is checked.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from cmbench.errors import NonFiniteError, UserError, blaming
from cmbench.samples.source import ReadOptions, SampleSource, plain_tensor
from cmbench.sampling.stream import SampleBatch

Generate = Callable[[Tensor, int], Any]
DEFAULT_COUNT = 50_000
_CHECKED = 4


class GeneratorSamples(SampleSource):
    """Images of a function, checked for range, repeatability and independence of the batch."""

    kind = "generator"
    _interface = "a function of (indices, seed) that returns images"

    def __init__(self, name: str, generate: Generate, options: ReadOptions) -> None:
        super().__init__(name, options)
        self._generate = generate
        self._check_modules()

    @classmethod
    def load(cls, entry: str, options: ReadOptions) -> Self:
        """Import ``module:function``; modules in the current folder are found too."""
        module_name, _, attribute = entry.partition(":")
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        with blaming(
            f"samples {entry}",
            "cannot be imported:",
            allowed="module:function",
            remedy="try `python -c 'import MODULE'`",
        ):
            target: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                target = getattr(target, part)
        if not callable(target):
            raise UserError(
                f"samples {entry}", f"is a {type(target).__name__}", allowed="a function"
            )
        return cls(entry, target, options)

    @property
    def count(self) -> int:
        """Samples to make."""
        return self.options.limit or self.options.protocol_samples or DEFAULT_COUNT

    def _check_modules(self) -> None:
        owner = getattr(self._generate, "__self__", self._generate)
        if isinstance(owner, nn.Module) and any(
            module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)
            for module in owner.modules()
        ):
            raise self.error(
                "its BatchNorm layers are in training mode, so images depend on their batch",
                remedy="call .eval() on the network",
            )

    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Call the function batch by batch."""
        for start in range(0, self.count, batch_size):
            indices = torch.arange(start, min(start + batch_size, self.count))
            images, labels = self._call(indices)
            if start == 0:
                first = images
            elif (images.shape[1:], images.dtype) != (first.shape[1:], first.dtype):
                raise self.error(
                    f"returned {tuple(images.shape[1:])} {images.dtype} from sample {start} on,"
                    f" {tuple(first.shape[1:])} {first.dtype} before",
                    allowed="images of one size and type",
                )
            if start == 0:
                self._check_repeatable(indices, images)
            yield SampleBatch(images, start, labels)

    def _call(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        who, what = f"samples {self.name}", f"raised for {len(indices)} samples:"
        with torch.inference_mode(), blaming(who, what, allowed=self._interface):
            found = self._generate(indices, self.options.seed)
        images, labels = self._tensors(found)
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[:2] != (len(indices), self.options.channels):
            raise self.error(
                f"returned images of shape {shape} for {len(indices)} samples",
                allowed=f"[{len(indices)}, {self.options.channels}, H, W]",
            )
        if images.dtype != torch.uint8:
            images = self._checked_floats(images)
        return images, labels

    def _tensors(self, found: object) -> tuple[Tensor, Tensor | None]:
        """Return what was returned as tensors without gradients."""
        pair = found if isinstance(found, tuple) else (found, None)
        kinds = ", ".join(type(part).__name__ for part in pair)
        try:
            images, labels = (
                plain_tensor(part) if isinstance(part, np.ndarray) else part for part in pair
            )
        except (TypeError, ValueError):
            images = labels = None
        labelled = labels is None or isinstance(labels, Tensor)
        if not isinstance(images, Tensor) or not labelled:
            raise self.error(
                f"returned {kinds}", allowed="an array of numbers, or (images, labels) as arrays"
            )
        return images.detach(), None if labels is None else labels.detach()

    def _checked_floats(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise self.error(
                f"returned images of {images.dtype}", allowed="uint8, or float in [-1, 1]"
            )
        if not torch.isfinite(images).all():
            raise NonFiniteError(
                f"samples {self.name}",
                "returned NaN or infinite images",
                remedy="the generator diverged",
            )
        low, high = float(images.min()), float(images.max())
        if max(-low, high) > 2:
            raise self.error(
                f"returned floats from {low:.3g} to {high:.3g}",
                allowed="[-1, 1]",
                remedy="scale the images, or return uint8",
            )
        if low >= 0 and high > 0.5:
            self._note("images are all in [0, 1]: are they meant for [-1, 1]?")
        return images.float()

    def _check_repeatable(self, indices: Tensor, images: Tensor) -> None:
        some = indices[:_CHECKED]
        again, _ = self._call(some)
        alone, _ = self._call(some[:1])
        scale = 255.0 if images.dtype == torch.uint8 else 2.0
        wanted = images[: len(some)].double()
        if float((again.double() - wanted).abs().mean()) > 0.02 * scale:
            self._note(
                "calling it again for the same sample numbers and seed gave other images: it does"
                " not derive its randomness from them, and the number cannot be reproduced"
            )
        elif float((alone.double() - wanted[:1]).abs().mean()) > 0.02 * scale:
            self._note(
                "an image changes with what shares its batch: BatchNorm in training mode, or one"
                " random stream for the whole batch"
            )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
