"""Training images as a run wants them: with or without labels, mirrored or not."""

from __future__ import annotations

from dataclasses import dataclass

from cmbench.data.base import Dataset
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.method import Batch


@dataclass(frozen=True)
class DatasetFeed:
    """Adapts a dataset's stream to the training loop (see :class:`cmbench.training.loop.Feed`)."""

    dataset: Dataset
    config: MethodConfig

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return images ``start … start + count - 1`` of the stream that ``seed`` names."""
        drawn = self.dataset.batch(start, count, seed, xflip=self.config.xflip)
        return Batch(drawn.images, drawn.labels if self.config.conditional else None)
