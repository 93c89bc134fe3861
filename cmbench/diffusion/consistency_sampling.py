"""Multistep sampling of consistency functions: denoise, add noise, denoise again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmbench.diffusion.solvers import NoiseSampler, batch_sigma, required_noise

#: ``consistency(x, time [N], labels) -> clean images``.
Consistency = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def multistep_consistency(
    consistency: Consistency,
    noise: Tensor,
    sigmas: Tensor,
    *,
    sigma_min: float,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    clip: bool = False,
) -> Tensor:
    """Return images of an EDM-frame consistency function (Song et al. 2023, Algorithm 1).

    ``x = f(sigma_0 noise, sigma_0)``, then ``x = f(x + sqrt(sigma_i^2 - sigma_min^2) z_i,
    sigma_i)``.

    Args:
        consistency: ``f(x_sigma, sigma [N], labels)``.
        noise: unit noise ``[N, C, H, W]``.
        sigmas: descending noise levels ``[NFE]``, the first ``sigma_max``; none below
            ``sigma_min``, none zero. NFE is its length.
        sigma_min: the boundary noise level; 0 adds the full ``sigma_i``.
        labels: int64 ``[N]`` or None.
        noise_sampler: ``noise_sampler(i)`` returns the unit noise ``z_i``, i = 1 … NFE - 1; not
            needed for one step.
        clip: clamp each output to [-1, 1], as the official code does for images.

    """
    x = noise * sigmas[0]
    for step, sigma in enumerate(sigmas):
        if step > 0:
            added = torch.sqrt((sigma**2 - sigma_min**2).clamp_min(0))
            x = x + added * required_noise("multistep_consistency", noise_sampler, step)
        x = consistency(x, batch_sigma(sigma, x), labels)
        if clip:
            x = x.clamp(-1, 1)
    return x


def sample_flow_map(
    flow_map: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    noise: Tensor,
    sigmas: Sequence[float],
    labels: Tensor | None = None,
) -> Tensor:
    """Return images after jumps along the trajectory from ``sigmas[0]`` to zero, without new noise.

    Args:
        flow_map: ``f(x_sigma, sigma [N], sigma_end [N], labels)`` in EDM's frame.
        noise: unit noise ``[N, C, H, W]``.
        sigmas: descending noise levels; NFE is their number.
        labels: int64 ``[N]`` or None.
    """
    like = noise[:, 0, 0, 0]
    x = sigmas[0] * noise
    for sigma, sigma_end in pairwise((*sigmas, 0.0)):
        x = flow_map(x, torch.full_like(like, sigma), torch.full_like(like, sigma_end), labels)
    return x


def multistep_trigflow(
    consistency: Consistency,
    noise: Tensor,
    times: Tensor,
    sigma_data: float,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    clip: bool = False,
) -> Tensor:
    """Return images of a TrigFlow-frame consistency function (Lu & Song 2024, App. G).

    ``x = f(sd noise, t_0)``, then ``x = f(cos(t_i) x + sin(t_i) sd z_i, t_i)``. As
    :func:`multistep_consistency`, with descending angles ``times`` ``[NFE]``, the first
    ``arctan(sigma_max / sd)``.
    """
    x = noise * sigma_data
    for step, t in enumerate(times):
        if step > 0:
            unit = required_noise("multistep_trigflow", noise_sampler, step)
            x = torch.cos(t) * x + torch.sin(t) * sigma_data * unit
        x = consistency(x, batch_sigma(t, x), labels)
        if clip:
            x = x.clamp(-1, 1)
    return x
