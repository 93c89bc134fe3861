"""Magnitude-preserving layers (Karras et al. 2024, arXiv:2312.02696, Sec. 2.2-2.4 and App. B).

Each keeps unit-variance inputs at unit variance in expectation, so that no normalisation layer with
learned gain is needed. Own implementation from the paper's formulas.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbench.networks import ops
from cmbench.networks.dual import Value
from cmbench.networks.layers import convolve

#: The paper's eps in normalisations.
EPS = 1e-4
#: E[silu(z)²]^½ for a standard normal z, rounded as in the paper (Eq. 81).
SILU_MAGNITUDE = 0.596


def normalize_weight(weight: Tensor) -> Tensor:
    """Scale weights ``[out, ...]`` to unit mean square per output (Eq. 47): norm sqrt(fan-in)."""
    dims = tuple(range(1, weight.ndim))
    norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    y: Tensor = weight / (EPS + norm / math.sqrt(math.prod(weight.shape[1:])))
    return y


class MPConv(nn.Module):
    """Linear layer (``size`` 0) or convolution whose rows have unit norm; no bias."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        shape = (outputs, inputs, size, size) if size else (outputs, inputs)
        self.weight = nn.Parameter(torch.randn(shape))

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.ndim == 2:
            return F.linear(x, weight)
        return convolve(x, weight, None, weight.shape[-1] // 2)

    def forward(self, x: Value, gain: Tensor | None = None) -> Value:
        """Map ``[N, inputs, ...]`` with normalised weights, times a scalar ``gain`` if given."""
        weight = normalize_weight(self.weight) / math.sqrt(math.prod(self.weight.shape[1:]))
        if gain is not None:
            weight = weight * gain
        return ops.weighted_map(self._apply_weight, x, weight.to(x.dtype))

    def normalize(self) -> None:
        """Forced weight normalisation (Sec. 2.3): project the stored weights, in place."""
        with torch.no_grad():
            self.weight.copy_(normalize_weight(self.weight))


class MPFourier(nn.Module):
    """``sqrt(2) cos(2 pi f c + phi)`` at fixed random frequencies and phases (Eq. 75)."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.freqs: Tensor
        self.phases: Tensor
        self.register_buffer("freqs", 2.0 * math.pi * torch.randn(dim) * scale)
        self.register_buffer("phases", 2.0 * math.pi * torch.rand(dim))

    def forward(self, c_noise: Value) -> Value:
        """Map ``[N]`` to ``[N, dim]``."""
        angle = ops.linear_map(lambda c: c[:, None] * self.freqs.to(c.dtype), c_noise)
        shifted = ops.add(angle, self.phases.to(c_noise.dtype))
        return ops.scale(ops.cos(shifted), math.sqrt(2.0))


class MPPositional(nn.Module):
    """Positional embedding at unit magnitude, for c_noise = t (sCM, Sec. 4.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        steps = torch.arange(half, dtype=torch.float32) / max(half - 1, 1)
        self.freqs: Tensor
        self.register_buffer("freqs", (1.0 / 10000.0) ** steps, persistent=False)

    def forward(self, c_noise: Value) -> Value:
        """Map ``[N]`` to ``[N, dim]``."""
        angle = ops.linear_map(lambda c: c[:, None] * self.freqs.to(c.dtype), c_noise)
        return ops.scale(ops.cos_sin(angle), math.sqrt(2.0))


def mp_silu(x: Value) -> Value:
    """SiLU at unit magnitude (Eq. 81), shape kept."""
    return ops.scale(ops.silu(x), 1.0 / SILU_MAGNITUDE)


def mp_sum(a: Value, b: Value, balance: float) -> Value:
    """``((1 - t) a + t b) / sqrt((1 - t)² + t²)`` (Eq. 88)."""
    norm = math.hypot(1.0 - balance, balance)
    return ops.blend(a, b, (1.0 - balance) / norm, balance / norm)


def mp_cat(a: Value, b: Value, balance: float) -> Value:
    """Concatenate ``[N, C, …]`` with equal shares of magnitude at ``balance`` 0.5 (Eq. 103)."""
    na, nb = a.shape[1], b.shape[1]
    total = math.sqrt((na + nb) / ((1.0 - balance) ** 2 + balance**2))
    wa, wb = total / math.sqrt(na) * (1.0 - balance), total / math.sqrt(nb) * balance
    return ops.cat([ops.scale(a, wa), ops.scale(b, wb)])
