"""Mixing of the states of a trajectory that a network computes at once.

A network with ``states = S`` in its config maps an image ``[N, C, H, W]`` and one noise label per
state ``[N, S]`` to ``[N, S, C, H, W]``. Its layers see the states as ``N S`` images in a row, each
with an embedding of its own; only :class:`TemporalMixing`, after every block, connects them.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks import ops
from cmbench.networks.dual import Value

#: Slope of the leaky rectifier below zero.
_SLOPE = 0.01


def repeat_for_states(x: Value, states: int) -> Value:
    """Return ``[N S, ...]``: every row of ``x`` ``[N, ...]`` S times in a row."""
    return ops.linear_map(
        lambda v: v[:, None].expand(len(v), states, *v.shape[1:]).flatten(0, 1), x
    )


def split_states(x: Tensor, states: int) -> Tensor:
    """Return ``[N, S, ...]`` of ``x`` ``[N S, ...]``."""
    return x.reshape(-1, states, *x.shape[1:])


def fourier_analysis(states: int, modes: int) -> Tensor:
    """Return the matrix ``[2 modes, states]`` of the first Fourier coefficients, float64.

    Real parts first, then imaginary parts: ``rfft`` in real arithmetic.
    """
    angles = _angles(states, modes)
    return torch.cat([torch.cos(angles), -torch.sin(angles)])


def fourier_synthesis(states: int, modes: int) -> Tensor:
    """Return the matrix ``[states, 2 modes]`` from coefficients to real states, float64.

    ``irfft`` with zeros in the place of all other modes: modes that have a conjugate count twice,
    and the imaginary part of a constant is not seen.
    """
    mode = torch.arange(modes)
    twice = torch.where((mode == 0) | (2 * mode == states), 1.0, 2.0).double()
    return (fourier_analysis(states, modes) * twice.repeat(2)[:, None] / states).T


def _angles(states: int, modes: int) -> Tensor:
    turns = torch.outer(torch.arange(modes), torch.arange(states)) % states
    return turns.double() * (2 * math.pi / states)


class TemporalMixing(nn.Module):
    """``x + LeakyReLU(irfft(R rfft(x)))`` along the states, ``R`` complex for the first modes.

    Zheng et al. 2023 (arXiv:2211.13449), Fig. 1: a convolution over time with a kernel in Fourier
    space. Both transforms are products with real matrices, so that tangents, compilers and half
    precision need no complex numbers; they are computed in at least float32, as in the official
    code (devzhk/DSNO-pytorch @0ffbfbb, models/layers.py). ``weight`` ``[2 modes, channels,
    channels]`` has the real parts of R first, input channels before output channels.
    """

    def __init__(self, channels: int, states: int, modes: int) -> None:
        super().__init__()
        if not 1 <= modes <= states // 2 + 1:
            raise UserError(
                "network",
                f"{modes} temporal modes of {states} states",
                allowed=f"1 to {states // 2 + 1}",
                remedy="choose fewer temporal_modes or more states",
            )
        self.states, self.modes = states, modes
        self.weight = nn.Parameter(torch.rand(2 * modes, channels, channels) / channels**2)
        self.analysis: Tensor
        self.synthesis: Tensor
        self.register_buffer("analysis", fourier_analysis(states, modes), persistent=False)
        self.register_buffer("synthesis", fourier_synthesis(states, modes), persistent=False)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``irfft(R rfft(x))`` for ``x`` ``[N S, C, ...]``; linear in ``x``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            states = split_states(x.to(wide), self.states).movedim(2, -1)
            spectrum = torch.einsum("fs,ns...c->nf...c", self.analysis.to(wide), states)
            re, im = spectrum.chunk(2, 1)
            weight_re, weight_im = weight.to(wide).chunk(2)
            mixed = torch.cat(
                [
                    _by_mode(re, weight_re) - _by_mode(im, weight_im),
                    _by_mode(re, weight_im) + _by_mode(im, weight_re),
                ],
                1,
            )
            y = torch.einsum("sf,nf...c->ns...c", self.synthesis.to(wide), mixed)
            return y.movedim(-1, 2).flatten(0, 1).to(x.dtype)

    def forward(self, x: Value) -> Value:
        """Map ``[N S, C, ...]`` to the same shape."""
        y = ops.weighted_map(self.convolve, x, self.weight)
        return ops.add(x, ops.leaky_relu(y, _SLOPE))


def _by_mode(x: Tensor, weight: Tensor) -> Tensor:
    """Mix channels, each mode by its own matrix."""
    return torch.einsum("nk...c,kco->nk...o", x, weight)


class _Temporal(Protocol):
    @property
    def states(self) -> int: ...

    @property
    def temporal_modes(self) -> int: ...


def temporal_mixing(config: _Temporal, channels: int) -> TemporalMixing | None:
    """Return what mixes the states after a block of ``channels`` outputs; None for one state."""
    if config.states == 1:
        return None
    return TemporalMixing(channels, config.states, config.temporal_modes)
