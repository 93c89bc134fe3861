"""The features of a cell's samples, ordered by sample number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.extractor import Features
from cmbench.metrics.reference import Reference


@dataclass(frozen=True, eq=False)
class Samples:
    """Features of all samples in the order of their numbers; fields as in ``Features``.

    ``labels`` are int64 ``[N]``, None unless every batch had some.
    """

    indices: Tensor
    pool: Tensor | None = None
    logits: Tensor | None = None
    spatial: Tensor | None = None
    labels: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def warnings(self, reference: Reference | None) -> list[str]:
        """Return warnings about too few samples."""
        found = []
        if self.pool is not None and self.count <= self.pool.shape[1]:
            found.append(
                f"{self.count} samples for {self.pool.shape[1]} features: the covariance is"
                " rank-deficient, the distance exact but strongly biased; use more samples"
            )
        if reference is not None and reference.count and self.count < reference.count / 2:
            found.append(
                f"{self.count} samples against {reference.count} reference images: the distance is"
                " biased upwards; compare it only with numbers of the same count"
            )
        return found


@dataclass
class SampleCollector:
    """Gathers batches of features in any order."""

    count: int = 0
    _indices: list[Tensor] = field(default_factory=list)
    _features: list[Features] = field(default_factory=list)
    _labels: list[Tensor] = field(default_factory=list)

    def add(self, indices: Tensor, features: Features | None, labels: Tensor | None = None) -> None:
        """Add one batch; its rows carry the sample numbers ``indices`` ``[N]``."""
        self.count += len(indices)
        self._indices.append(indices.cpu())
        if features is not None:
            self._features.append(features)
        if labels is not None:
            self._labels.append(labels)

    def samples(self) -> Samples:
        """Return everything in the order of sample numbers.

        Raises:
            UserError: a sample number occurs twice, or there are no samples.
        """
        if not self.count:
            raise UserError("metrics", "no samples", allowed="at least 2", remedy="sample first")
        indices, order = torch.cat(self._indices).sort(stable=True)
        repeated = int((indices[1:] == indices[:-1]).sum())
        if repeated:
            raise UserError(
                "metrics",
                f"{repeated} sample numbers occur twice",
                allowed="each image once",
                remedy="divide the samples among processes without padding",
            )
        return Samples(
            indices,
            pool=_ordered([features.pool for features in self._features], order),
            logits=_ordered([features.logits for features in self._features], order),
            spatial=_ordered([features.spatial for features in self._features], order),
            labels=_ordered(self._labels, order),
        )


def _ordered(parts: Sequence[Tensor | None], order: Tensor) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if sum(map(len, present)) < len(order):
        return None
    rows = torch.cat([part.to(present[0].device) for part in present])
    return rows[order.to(rows.device)]
