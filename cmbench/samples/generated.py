"""Samples that a method of this harness makes, with counted network evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sampling import Sampler
from cmbench.sampling.stream import SampleBatch


class GeneratedSamples(SampleSource):
    """Images of a sampler, decoded to pixels.

    Args:
        name: the run's id.
        sampler: makes the images and counts what they cost.
        to_pixels: maps images of the data's space to pictures (see ``Dataset.to_pixels``).
        count: images to make, unless ``options`` limit them.
        options: of reading; only ``limit`` matters.

    Raises:
        PluginError: while iterating: the counted evaluations differ from the declared ones.
        NonFiniteError: while iterating: an image has NaN or infinite values.
    """

    kind = "run"
    read_ahead = False  # sampling and extraction compute on the same device

    def __init__(
        self,
        name: str,
        sampler: Sampler,
        to_pixels: Callable[[Tensor], Tensor],
        count: int,
        options: ReadOptions | None = None,
    ) -> None:
        super().__init__(name, options or ReadOptions())
        self.sampler, self._to_pixels = sampler, to_pixels
        self._count = count

    @property
    def count(self) -> int:
        """Samples to make."""
        return self.limited(self._count)

    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Yield generated images, float in [-1, 1] (unbounded for data without quantization)."""
        for batch in self.sampler.stream(self.count, batch_size):
            yield replace(batch, images=self._to_pixels(batch.images))
        self.sampler.check_nfe()

    def first_again(self, sizes: Sequence[int], batch_size: int) -> Tensor:
        """Make the first images again, in batches of ``sizes``; at most as many as there are.

        A compiled network makes them in one batch, which copies fill up to ``batch_size``.
        """
        made, first = [], 0
        for size in (sum(sizes),) if self.sampler.fixed_batch else sizes:
            if (size := min(size, self.count - first)) > 0:
                batch = self.sampler.make(first, size, min(batch_size, self.count))
                made.append(self._to_pixels(batch.images).cpu())
                first += size
        return torch.cat(made)
