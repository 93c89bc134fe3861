"""Distances between image batches: ``[N, ...]`` and ``[N, ...]`` to one value per image, ``[N]``.

Sum or mean over pixels changes the effective learning rate, so each name says which it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_l2_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return ``||a - b||^2`` ``[N]``, summed over pixels."""
    return (a - b).flatten(1).square().sum(dim=1)


def l2_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over pixels of ``(a - b)^2``, ``[N]`` (Song et al. 2023, as released)."""
    return (a - b).flatten(1).square().mean(dim=1)


def l1_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over pixels of ``|a - b|``, ``[N]`` (Song et al. 2023, as released)."""
    return (a - b).flatten(1).abs().mean(dim=1)


def l2_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return the vector norm ``||a - b||`` ``[N]``; its gradient is zero, not NaN, at ``a = b``.

    Geng et al. 2024 (arXiv:2406.14548) train with this distance; the root's derivative is infinite
    at zero, where zero is a subgradient of the norm.
    """
    squared = squared_l2_sum(a, b)
    positive = squared > 0
    # Both branches of a `where` are differentiated: the root must never see the zero.
    root = torch.sqrt(torch.where(positive, squared, torch.ones_like(squared)))
    return torch.where(positive, root, torch.zeros_like(squared))


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return ``sqrt(||a - b||^2 + c^2) - c`` ``[N]`` on the *per-image* vector norm, ``c >= 0``.

    Song & Dhariwal 2023 (arXiv:2310.14189), Sec. 3.3. Not the per-pixel loss of the same name.
    Written as ``s / (sqrt(s + c^2) + c)``, which does not cancel at small distances. At ``c = 0``
    it is the norm.
    """
    if c == 0:
        return l2_norm(a, b)
    squared = squared_l2_sum(a, b)
    return squared / (torch.sqrt(squared + c**2) + c)


def huber_constant(dims: int) -> float:
    """Return ``c = 0.00054 sqrt(dims)`` for images of ``dims`` values (arXiv:2310.14189, Sec. 3.3).

    0.02993 for 3x32x32, 0.05986 for 3x64x64.
    """
    return 0.00054 * math.sqrt(dims)
