"""Analytic datasets: Gaussian mixtures with closed-form score and exact flow map.

The training stream is infinite and never repeats: block ``b`` of it is drawn with the seed
(seed, "block", b), so an image depends on (seed, position) only.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.data.locations import DataLocations
from cmbench.diffusion.gaussian_mixture import GaussianMixture, image_mixture, ring_mixture
from cmbench.plugin.method import Batch
from cmbench.plugin.specs import DatasetSpec
from cmbench.seeds import derive_seed

BLOCK = 4096
_BLOCKS_KEPT = 3
#: Size of the reference set, for the distances that compare samples with samples.
REFERENCE_COUNT = 10_000


def content_hash(mixture: GaussianMixture) -> str:
    """Return a hash of the mixture's parameters to nine decimals (the same on every platform)."""
    values = [
        [round(v, 9) + 0.0 for v in t.double().flatten().tolist()]
        for t in (mixture.means, mixture.stds, mixture.weights)
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class AnalyticDataset(Dataset):
    """An endless stream from :attr:`mixture`, whose exact flow map scores a generator.

    ``sigma_data`` is the mixture's true standard deviation.
    """

    def __init__(self, spec: DatasetSpec, mixture: GaussianMixture, *, revision: str) -> None:
        super().__init__(spec, sha256=content_hash(mixture), revision=revision, size=None)
        assert mixture.shape == spec.data_shape, (mixture.shape, spec.data_shape)
        self.mixture = mixture
        self.sigma_data = mixture.data_std()
        if spec.num_classes:
            weights = torch.zeros(spec.num_classes, dtype=torch.float64)
            assert mixture.labels is not None
            weights.index_add_(0, mixture.labels, mixture.weights.double())
            self.class_counts = tuple(int(w) for w in (weights / weights.sum() * 1e6).round())
        self._blocks: OrderedDict[tuple[int, int], tuple[Tensor, Tensor | None]] = OrderedDict()

    def to(self, device: torch.device | str) -> Self:
        """Return a copy whose batches lie on ``device``; drawing stays on the CPU."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.device, moved._blocks = device, OrderedDict()
        return moved

    def _block(self, seed: int, block: int) -> tuple[Tensor, Tensor | None]:
        key = (seed, block)
        if key not in self._blocks:
            generator = torch.Generator().manual_seed(derive_seed(seed, "block", block))
            images, labels = self.mixture.sample(BLOCK, generator)
            self._blocks[key] = (
                images.to(self.device),
                None if labels is None else labels.to(self.device),
            )
            while len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return self._blocks[key]

    def batch(self, start: int, count: int, seed: int, *, xflip: bool = False) -> Batch:
        """See :meth:`Dataset.batch`; ``indices`` are stream positions. ``xflip`` is refused."""
        if xflip:
            raise ValueError(f"dataset {self.name!r} has no mirror symmetry; set xflip=false")
        images, labels = [], []
        position, end = start, start + count
        while position < end:
            block, offset = divmod(position, BLOCK)
            stop = min(offset + end - position, BLOCK)
            x, y = self._block(seed, block)
            images.append(x[offset:stop])
            if y is not None:
                labels.append(y[offset:stop])
            position += stop - offset
        indices = torch.arange(start, end, device=self.device)
        return Batch(torch.cat(images), torch.cat(labels) if labels else None, indices=indices)

    @property
    def reference_count(self) -> int:
        """Number of reference samples."""
        return REFERENCE_COUNT

    def reference_images(self, batch_size: int = 500) -> Iterator[Tensor]:
        """Yield :data:`REFERENCE_COUNT` samples, float32, from a fixed seed."""
        seed = derive_seed(self.name, "reference")
        for start in range(0, REFERENCE_COUNT, batch_size):
            yield self.batch(start, min(batch_size, REFERENCE_COUNT - start), seed).images.cpu()

    def exact_flow_map(
        self, noise: Tensor, labels: Tensor | None = None, *, sigma_max: float = 80.0
    ) -> Tensor:
        """See :meth:`Dataset.exact_flow_map`; solved in float64 to about 1e-10."""
        mixture = self.mixture.to(noise.device)
        sigma = torch.full((len(noise),), sigma_max, dtype=torch.float64, device=noise.device)
        return mixture.flow_map(noise.double() * sigma_max, sigma, 0.0, labels).to(noise.dtype)


def build_ring(spec: DatasetSpec, locations: DataLocations) -> AnalyticDataset:
    """Return ``gmm``: eight narrow modes on a ring in the plane."""
    return AnalyticDataset(spec, ring_mixture(), revision="ring-8")


def build_image_mixture(spec: DatasetSpec, locations: DataLocations) -> AnalyticDataset:
    """Return ``gmm-8x8``: twenty modes that are 8x8 gratings, two per class."""
    return AnalyticDataset(spec, image_mixture(), revision="gratings-20")
