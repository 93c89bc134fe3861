"""Named draws whose rows belong to images, and that remember what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cmbench.seeds import derive_seed


@dataclass
class RowDraws:
    """Draws of the images ``indices``: an image gets the same numbers in every batch.

    Draws that are not per image (another number of rows) depend on their name only.
    """

    indices: Sequence[int]
    seed: int = 0
    #: the names in the order in which they were asked for
    asked: list[str] = field(default_factory=list)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return standard normal numbers like ``like``."""
        return self._drawn(name, like, "normal_")

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1) like ``like``."""
        return self._drawn(name, like, "uniform_")

    def _drawn(self, name: str, like: Tensor, fill: str) -> Tensor:
        self.asked.append(name)
        drawn = partial(self._filled, name, like, fill)
        if len(like) != len(self.indices):
            return drawn(tuple(like.shape), -1)
        return torch.stack([drawn(tuple(like.shape[1:]), index) for index in self.indices])

    def _filled(
        self, name: str, like: Tensor, fill: str, shape: tuple[int, ...], index: int
    ) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, name, index))
        return getattr(like.new_empty(shape), fill)(generator=generator)  # type: ignore[no-any-return]
