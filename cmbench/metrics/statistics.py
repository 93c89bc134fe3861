"""Streaming mean and covariance of features: float64, mergeable, with the divisor on record.

The state is (n, mean, M2) with M2 the sum of outer products of centred rows. Batches are merged by
the pairwise update of Chan, Golub and LeVeque (1983), eq. 1.5, which loses no digits however the
samples are split, so neither batch size nor the number of processes changes the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics._files import read_tensors, sha256_tensors, write_tensors

Divisor = Literal["n-1", "n", "unknown"]
KIND = "feature-statistics"


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean ``[D]`` and covariance ``[D, D]`` in float64.

    ``count`` is the number of samples behind them, None where a file does not say; ``divisor`` is
    what the covariance was divided by.
    """

    mean: Tensor
    cov: Tensor
    count: int | None = None
    divisor: Divisor = "unknown"

    def __post_init__(self) -> None:
        dim = self.mean.shape[0] if self.mean.dim() == 1 else -1
        if self.cov.shape != (dim, dim):
            raise UserError(
                "feature statistics",
                f"mean of shape {tuple(self.mean.shape)} with covariance {tuple(self.cov.shape)}",
                allowed="[D] and [D, D]",
                remedy="check which arrays of the file hold them",
            )
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.cov).all()):
            raise NonFiniteError("feature statistics", "hold NaN or infinite values")

    @property
    def dim(self) -> int:
        """Number of features D."""
        return self.mean.shape[0]

    @property
    def rank_bound(self) -> int:
        """The rank that the covariance can have at most: min(D, count - 1)."""
        return self.dim if self.count is None else max(0, min(self.dim, self.count - 1))

    @property
    def sha256(self) -> str:
        """Hash of the values."""
        return sha256_tensors({"mean": self.mean, "cov": self.cov})


class FeatureStatistics:
    """Streaming (n, mean, M2) of feature rows, in float64 on the device of the first batch."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureStatistics:
        """Return the statistics of ``features`` ``[N, D]``."""
        statistics = cls(features.shape[1], features.device)
        statistics.update(features)
        return statistics

    @classmethod
    def merged(cls, parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
        """Return the merge of ``parts``, taken in the order given (one a process, say)."""
        parts = list(parts)
        total = cls(parts[0].dim, parts[0].mean.device)
        for part in parts:
            total.merge(part)
        return total

    @property
    def dim(self) -> int:
        """Number of features D."""
        return self.mean.shape[0]

    def update(self, features: Tensor) -> None:
        """Add rows ``[N, D]`` of any float dtype; N may be 0.

        Raises:
            UserError: the rows have another width.
            NonFiniteError: a feature is NaN or infinite.
        """
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise UserError(
                "feature statistics",
                f"features of shape {tuple(features.shape)}",
                allowed=f"[N, {self.dim}]",
                remedy="use one extractor for all batches",
            )
        if features.shape[0] == 0:
            return
        rows = features.detach().to(self.mean.device, torch.float64)
        if not torch.isfinite(rows).all():
            raise NonFiniteError(
                "feature statistics",
                f"NaN or infinite features after {self.count} samples",
                remedy="look at the images: they are likely non-finite or out of range",
            )
        mean = rows.mean(0)
        centred = rows - mean
        self._merge(rows.shape[0], mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add another accumulator's samples."""
        if other.dim != self.dim:
            raise UserError(
                "feature statistics",
                f"{other.dim} features",
                allowed=f"{self.dim}",
                remedy="use one extractor",
            )
        if other.count:
            device = self.mean.device
            self._merge(other.count, other.mean.to(device), other.m2.to(device))

    def _merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + torch.outer(delta, delta) * (self.count * count / total)
        self.count = total

    def moments(self, divisor: Divisor = "n-1") -> Moments:
        """Return mean and covariance; needs two samples.

        ``divisor`` "n-1" is the unbiased estimator and the default everywhere; "n" reproduces the
        protocols that divide by the number of samples.
        """
        if self.count < 2:
            raise UserError(
                "feature statistics",
                f"{self.count} samples",
                allowed="at least 2",
                remedy="evaluate more samples",
            )
        if divisor == "unknown":
            raise UserError("feature statistics", "divisor 'unknown'", allowed="n-1, n")
        cov = self.m2 / (self.count - 1 if divisor == "n-1" else self.count)
        return Moments(self.mean, (cov + cov.T) / 2, self.count, divisor)

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance ``[D, D]`` (divisor n - 1)."""
        return self.moments().cov

    @property
    def sha256(self) -> str:
        """Hash of count and values."""
        return sha256_tensors(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "mean": self.mean, "m2": self.m2}

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        write_tensors(path, self._tensors(), {"kind": KIND, "sha256": self.sha256})

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Read what :meth:`save` wrote; a file whose hash does not match is a UserError."""
        tensors, metadata = read_tensors(path, KIND)
        if set(tensors) != {"count", "mean", "m2"} or sha256_tensors(tensors) != metadata.get(
            "sha256"
        ):
            raise UserError(
                str(path),
                "content does not match its hash",
                allowed="an unaltered feature-statistics file",
                remedy="delete the file and run again: it will be made anew",
            )
        statistics = cls(0)
        statistics.count = int(tensors["count"])
        statistics.mean, statistics.m2 = tensors["mean"], tensors["m2"]
        return statistics
