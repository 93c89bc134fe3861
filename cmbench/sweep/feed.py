"""Training images as a run wants them: with or without labels, mirrored, augmented."""

from __future__ import annotations

from dataclasses import dataclass

from cmbench.data.base import Dataset
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.method import Batch
from cmbench.training.augment import augment
from cmbench.training.randomness import StepDraws


@dataclass(frozen=True)
class DatasetFeed:
    """Adapts a dataset's stream to the training loop (see :class:`cmbench.training.loop.Feed`)."""

    dataset: Dataset
    config: MethodConfig

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return images ``start … start + count - 1`` of the stream that ``seed`` names.

        Augmentations belong to the shard that starts at ``start``, as all draws of a step do.
        """
        drawn = self.dataset.batch(start, count, seed, xflip=self.config.xflip)
        labels = drawn.labels if self.config.conditional else None
        if self.config.augment == 0:
            return Batch(drawn.images, labels)
        draws = StepDraws(seed, start)
        images, augment_labels = augment(drawn.images, draws, self.config.augment)
        return Batch(images, labels, augment_labels)
