"""Per-image randomness: image ``i`` gets the same noise whatever batch or process makes it.

Numbers are drawn on the CPU, one generator an image seeded with ``(seed, name, i)``, so that a CPU
and a GPU start from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmbench.seeds import derive_seed


@dataclass(frozen=True)
class ImageDraws:
    """Named draws for the images ``indices`` (see :class:`cmbench.plugin.method.Draws`)."""

    seed: int
    indices: Sequence[int]

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return standard normal numbers like ``like`` ``[N, …]``, row i from image i's seed."""
        out = torch.empty(like.shape, dtype=torch.float32)
        for row, generator in zip(out, self._generators(name, len(out)), strict=True):
            row.normal_(generator=generator)
        return out.to(like.device, like.dtype, non_blocking=True)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1) shaped as ``like``."""
        out = torch.empty(like.shape, dtype=torch.float32)
        flat = out.reshape(len(out), -1)
        for row, generator in zip(flat, self._generators(name, len(out)), strict=True):
            row.uniform_(generator=generator)
        return out.to(like.device, like.dtype, non_blocking=True)

    def _generators(self, name: str, count: int) -> list[torch.Generator]:
        if count != len(self.indices):
            raise ValueError(f"draw {name!r} asks for {count} images, the batch has "
                             f"{len(self.indices)}")
        return [
            torch.Generator().manual_seed(derive_seed(self.seed, name, index))
            for index in self.indices
        ]
