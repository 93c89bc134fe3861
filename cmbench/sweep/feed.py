"""Training images with the options of a run: labels, mirroring, augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        batch = drawn if self.config.conditional else replace(drawn, labels=None)
        if self.config.augment == 0:
            return batch
        images, labels = augment(drawn.images, StepDraws(seed, start), self.config.augment)
        return replace(batch, images=images, augment_labels=labels)
