"""Layers over plain tensors and duals: linear, convolution with resampling, norms, embeddings.

Shapes: N images, C channels, H x W pixels, E embedding features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks import ops
from cmbench.networks.dual import Value

ResampleMode = Literal["keep", "up", "down"]


class Init(NamedTuple):
    """How weights start: a distribution scaled by fan, times ``gain``."""

    mode: Literal["xavier-uniform", "kaiming-uniform", "kaiming-normal"] = "xavier-uniform"
    gain: float = 1.0


XAVIER = Init()
KAIMING = Init("kaiming-normal")


def init_weight(weight: Tensor, init: Init) -> None:
    """Fill a linear or convolution weight ``[out, in, ...]`` in place."""
    receptive = weight[0, 0].numel()
    fan_out, fan_in = weight.shape[0] * receptive, weight.shape[1] * receptive
    with torch.no_grad():
        if init.mode == "kaiming-normal":
            weight.normal_(0.0, init.gain * math.sqrt(1.0 / fan_in))
            return
        spread = 3.0 / fan_in if init.mode == "kaiming-uniform" else 6.0 / (fan_in + fan_out)
        bound = math.sqrt(spread) * init.gain
        weight.uniform_(-bound, bound)


class Linear(nn.Module):
    """``y = x Wᵀ + b`` over the last axis."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, init: Init = XAVIER
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        init_weight(self.weight, init)

    def forward(self, x: Value) -> Value:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        return ops.linear(x, self.weight, self.bias)


#: Mean pooling down, nearest neighbour up.
BOX: tuple[float, ...] = (1, 1)


def filter_kernel(taps: Sequence[float]) -> Tensor:
    """Return a separable filter of sum one ``[1, 1, len(taps), len(taps)]``, float32."""
    row = torch.tensor(taps, dtype=torch.float32)
    return row.outer(row)[None, None] / row.sum() ** 2


class Resample(nn.Module):
    """Halve or double the resolution with a separable filter (EDM's convention).

    The taps ``(1, 1)`` are a box: mean pooling down, nearest neighbour up.
    """

    def __init__(self, mode: ResampleMode, taps: tuple[float, ...] = BOX) -> None:
        super().__init__()
        self.mode, self.taps = mode, taps
        self.kernel: Tensor
        self.register_buffer("kernel", filter_kernel(taps), persistent=False)

    def forward(self, x: Value) -> Value:
        """Map ``[N, C, H, W]`` to half or twice the resolution."""
        return x if self.mode == "keep" else ops.linear_map(self._filter, x)

    def _filter(self, x: Tensor) -> Tensor:
        if self.taps == BOX:
            if self.mode == "down":
                return F.avg_pool2d(x, 2)
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        channels, pad = x.shape[1], (len(self.taps) - 1) // 2
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        if self.mode == "down":
            return F.conv2d(x, kernel, stride=2, padding=pad, groups=channels)
        return F.conv_transpose2d(x, kernel * 4.0, stride=2, padding=pad, groups=channels)


def favour_layout(x: Tensor) -> Tensor:
    """Return ``x [N, C, H, W]`` in the memory layout that its device convolves fastest.

    On the CPU that is channels-last, which oneDNN takes without reordering (about 1.3x on forward
    and backward). On a GPU the caller's layout stands: it depends on precision and compiler.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve ``[N, C, H, W]`` at stride 1; 1x1 on channels-last CPU tensors is a product.

    (PyTorch sends the latter to a slow im2col kernel.)
    """
    pixelwise = weight.shape[-1] == 1 and x.device.type == "cpu"
    if pixelwise and x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, padding=padding)


class Conv2d(nn.Module):
    """A square convolution of stride 1, after an optional resampling."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        bias: bool = True,
        resample: ResampleMode = "keep",
        taps: tuple[float, ...] = BOX,
        init: Init = XAVIER,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.padding = size // 2
        self.resample = None if resample == "keep" else Resample(resample, taps)
        init_weight(self.weight, init)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(x, weight, bias, self.padding)

    def forward(self, x: Value) -> Value:
        """Map ``[N, inputs, H, W]`` to ``[N, outputs, H', W']``."""
        if self.resample is not None:
            x = self.resample(x)
        return ops.weighted_map(self._conv, x, self.weight, self.bias)


class GroupNorm(nn.Module):
    """Group normalisation with at most ``groups`` groups of at least ``min_channels`` channels."""

    def __init__(
        self, channels: int, *, groups: int = 32, min_channels: int = 4, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.groups = min(groups, channels // min_channels)
        if self.groups == 0 or channels % self.groups:
            raise UserError(
                "network",
                f"a width of {channels} channels, which {self.groups} normalisation groups do not "
                "share",
                allowed=f"multiples of {min_channels} up to {groups * min_channels}, beyond of "
                f"{groups}",
                remedy="choose another base width or channel_mult",
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Value) -> Value:
        """Normalise ``[N, C, H, W]``."""
        return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class PositionalEmbedding(nn.Module):
    """Cosines and sines at frequencies from 1 down to 1/10000 (Vaswani et al. 2017).

    ``endpoint`` includes the last frequency; ``sine_first`` swaps the halves (DDPM's order).
    """

    def __init__(self, dim: int, *, endpoint: bool = True, sine_first: bool = True) -> None:
        super().__init__()
        half = dim // 2
        steps = torch.arange(half, dtype=torch.float32) / max(half - (1 if endpoint else 0), 1)
        self.sine_first = sine_first
        self.freqs: Tensor
        self.register_buffer("freqs", (1.0 / 10000.0) ** steps, persistent=False)

    def forward(self, c_noise: Value) -> Value:
        """Map ``[N]`` to ``[N, dim]``."""
        angle = ops.linear_map(lambda c: c[:, None] * self.freqs.to(c.dtype), c_noise)
        return _sine_first(ops.cos_sin(angle)) if self.sine_first else ops.cos_sin(angle)


def _sine_first(emb: Value) -> Value:
    return ops.linear_map(lambda e: e.roll(e.shape[1] // 2, 1), emb)


class FourierEmbedding(nn.Module):
    """Cosines and sines at fixed random frequencies (Tancik et al. 2020)."""

    def __init__(self, dim: int, scale: float, *, sine_first: bool = False) -> None:
        super().__init__()
        self.sine_first = sine_first
        self.freqs: Tensor
        self.register_buffer("freqs", torch.randn(dim // 2) * scale)

    def forward(self, c_noise: Value) -> Value:
        """Map ``[N]`` to ``[N, dim]``."""
        angle = ops.linear_map(
            lambda c: c[:, None] * (self.freqs * (2.0 * math.pi)).to(c.dtype), c_noise
        )
        return _sine_first(ops.cos_sin(angle)) if self.sine_first else ops.cos_sin(angle)


def make_embedding(kind: str, dim: int, fourier_scale: float) -> nn.Module:
    """Return the noise embedding ``[N] -> [N, dim]`` that a config names."""
    if kind == "fourier":
        return FourierEmbedding(dim, fourier_scale, sine_first=True)
    return PositionalEmbedding(dim)


class ClassEmbedding(nn.Module):
    """A learned vector per class; no class (None or a negative index) is the zero vector plus bias.

    ``scale`` multiplies the one-hot vector. A product with one-hot vectors, not a gather: its
    gradient is deterministic on every device.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        scale: float = 1.0,
        bias: bool = False,
        dropout: float = 0.0,
        init: Init = KAIMING,
    ) -> None:
        super().__init__()
        self.num_classes, self.scale, self.dropout = num_classes, scale, dropout
        self.weight = nn.Parameter(torch.empty(dim, num_classes))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        init_weight(self.weight, init)

    def one_hot(self, labels: Tensor | None, n: int) -> Tensor:
        """Return float one-hot rows ``[N, num_classes]``, rows of zeros where there is no class."""
        weight = self.weight
        if labels is None:
            return weight.new_zeros(n, self.num_classes)
        index = torch.arange(self.num_classes, device=weight.device)
        rows = (labels[:, None] == index).to(weight.dtype)
        if self.training and self.dropout > 0.0:
            rows = rows * (torch.rand(n, 1, device=weight.device) >= self.dropout)
        return rows

    def forward(self, labels: Tensor | None, n: int) -> Tensor:
        """Map class indices ``[N]`` to ``[N, dim]``."""
        return F.linear(self.one_hot(labels, n) * self.scale, self.weight, self.bias)
