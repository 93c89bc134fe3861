"""Streaming mean and covariance of features: float64, with the divisor on record.

The state is (n, mean, M2) with M2 the sum of outer products of centred rows. Batches are merged by
the pairwise update of Chan, Golub and LeVeque (1983), eq. 1.5, which loses no digits however the
samples are split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics._files import sha256_tensors

Divisor = Literal["n-1", "unknown"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean ``[D]`` and covariance ``[D, D]`` in float64.

    ``count`` is the number of samples behind them, None where a file does not say; ``divisor`` is
    what the covariance was divided by; ``known_factor`` is :attr:`factor` if it is known.
    """

    mean: Tensor
    cov: Tensor
    count: int | None = None
    divisor: Divisor = "unknown"
    known_factor: Tensor | None = None

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
            raise NonFiniteError("feature statistics", "mu or sigma hold NaN or infinite values")

    @property
    def dim(self) -> int:
        """Number of features D."""
        return self.mean.shape[0]

    @property
    def rank_bound(self) -> int:
        """The rank that the covariance can have at most: min(D, count - 1)."""
        return self.dim if self.count is None else max(0, min(self.dim, self.count - 1))

    @cached_property
    def sha256(self) -> str:
        """Hash of mean and covariance (rounding included, so it may differ between machines)."""
        return sha256_tensors({"mean": self.mean, "cov": self.cov})

    @cached_property
    def factor(self) -> Tensor:
        """F ``[D, r]`` with F Fᵀ = cov, without the directions that are only rounding.

        It keeps eigenvalues above rounding (λ_max·D·eps), at most :attr:`rank_bound` of them.
        """
        if self.known_factor is not None:
            return self.known_factor
        values, vectors = torch.linalg.eigh(self.cov)
        smallest = values[-1].clamp(min=0) * self.dim * torch.finfo(torch.float64).eps
        rank = min(int((values > smallest).sum()), self.rank_bound)
        keep = slice(self.dim - rank, self.dim)
        factor: Tensor = vectors[:, keep] * values[keep].sqrt()
        # Row by row in memory, as in a file: last bits of products depend on the layout.
        return factor.contiguous()

    def to(self, device: torch.device | str) -> Moments:
        """Return a copy on ``device``, with the factor."""
        mean, cov, factor = (x.to(device) for x in (self.mean, self.cov, self.factor))
        return Moments(mean, cov, self.count, self.divisor, factor)


class FeatureStatistics:
    """Streaming (n, mean, M2) of feature rows, in float64 on the device of the first batch."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(dim, dim, dtype=torch.float64, device=device)

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

    def _merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + torch.outer(delta, delta) * (self.count * count / total)
        self.count = total

    def moments(self) -> Moments:
        """Return mean and unbiased covariance (divisor n - 1); needs two samples."""
        if self.count < 2:
            raise UserError(
                "feature statistics",
                f"{self.count} samples",
                allowed="at least 2",
                remedy="evaluate more samples",
            )
        cov = self.m2 / (self.count - 1)
        return Moments(self.mean, (cov + cov.T) / 2, self.count, "n-1")


def moments_of(features: Tensor) -> Moments:
    """Return mean and unbiased covariance of rows ``[N, D]`` on their device; N >= 2."""
    statistics = FeatureStatistics(features.shape[1], features.device)
    statistics.update(features)
    return statistics.moments()
