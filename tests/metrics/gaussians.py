"""Covariances whose Fréchet distance is known exactly, without taking a matrix root."""

from __future__ import annotations

import math

import torch
from torch import Tensor

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator(seed), dtype=F64))[0]


def commuting(dim: int, a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return covariances with eigenvalues a and b in one basis, and their tr (S1 S2)^½."""
    basis = orthogonal(dim, seed)
    s1, s2 = (basis * a) @ basis.T, (basis * b) @ basis.T
    return (s1 + s1.T) / 2, (s2 + s2.T) / 2, float((a * b).sqrt().sum())


def blocks(pairs: int, seed: int, *, singular: int = 0) -> tuple[Tensor, Tensor, float]:
    """Return non-commuting covariances ``[2 pairs, 2 pairs]`` and their exact tr (S1 S2)^½.

    For 2x2 matrices tr (AB)^½ = √(tr AB + 2 √(det A det B)); 2x2 blocks are rotated by a common
    orthogonal matrix, which leaves the trace alone. In the first ``singular`` blocks both sides
    have rank 1, so the total rank is 2 pairs - singular.
    """
    factors = torch.randn(2, pairs, 2, 2, generator=generator(seed), dtype=F64)
    factors[:, :singular, :, 1] = 0
    a, b = factors[0] @ factors[0].mT, factors[1] @ factors[1].mT
    product = (a @ b).diagonal(dim1=1, dim2=2).sum(1)
    determinants = torch.linalg.det(factors[0]).abs() * torch.linalg.det(factors[1]).abs()
    root = float((product + 2 * determinants).sqrt().sum())
    basis = orthogonal(2 * pairs, seed + 1)
    s1 = basis @ torch.block_diag(*a) @ basis.T
    s2 = basis @ torch.block_diag(*b) @ basis.T
    return (s1 + s1.T) / 2, (s2 + s2.T) / 2, root


def samples_with_covariance(count: int, factor: Tensor, seed: int) -> Tensor:
    """Return ``[count, D]`` rows of mean 0 and unbiased covariance exactly ``factor factorᵀ``."""
    rank = factor.shape[1]
    assert rank < count
    raw = torch.randn(count, rank, generator=generator(seed), dtype=F64)
    white = torch.linalg.qr(raw - raw.mean(0))[0]
    return math.sqrt(count - 1) * white @ factor.T
