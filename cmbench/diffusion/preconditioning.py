"""Preconditioning: how a raw network becomes a denoiser or a consistency function.

``D(x, sigma) = c_skip x + c_out F(c_in x, c_noise, labels)``. Noise levels and angles ``[N]``,
images ``[N, C, H, W]``; any float dtype, differentiable in both modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims, tiny

#: A raw network: ``network(x_in [N,C,H,W], c_noise [N], labels [N] or None, ...) -> F``.
RawNetwork = Callable[..., Tensor]


@dataclass(frozen=True)
class Scalings:
    """The four scalings of a preconditioned network, each ``[N]``."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_scalings(sigma: Tensor, sigma_data: float) -> Scalings:
    """Return EDM's scalings ``[N]`` (Karras et al. 2022, arXiv:2206.00364, Table 1 and Eq. 7).

    ``sigma = 0`` is allowed: there ``c_skip = 1``, ``c_out = 0`` and ``c_noise`` is floored to a
    finite value, so that ``D(x, 0) = x`` exactly.
    """
    variance = sigma**2 + sigma_data**2
    root = torch.sqrt(variance)
    return Scalings(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data / root,
        c_in=1 / root,
        c_noise=torch.log(sigma.clamp_min(tiny(sigma))) / 4,
    )


def boundary_scalings(sigma: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
    """Return scalings ``[N]`` of a consistency function with ``f(x, sigma_min) = x`` bitwise.

    ``c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2)``,
    ``c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2)``; ``c_in`` and ``c_noise`` are EDM's
    (Song et al. 2023, arXiv:2303.01469, App. C). ``sigma_min = 0`` gives EDM's own scalings.
    """
    plain = edm_scalings(sigma, sigma_data)
    # sigma_min rounded to sigma's dtype: the difference is exactly zero at the boundary.
    gap = sigma - torch.full_like(sigma, sigma_min)
    # c_skip is the quotient of one number by itself at the boundary, hence exactly one.
    data_variance = torch.full_like(sigma, sigma_data**2)
    return Scalings(
        c_skip=data_variance / (gap**2 + data_variance),
        c_out=sigma_data * gap * plain.c_in,
        c_in=plain.c_in,
        c_noise=plain.c_noise,
    )


def precondition(
    network: RawNetwork,
    x: Tensor,
    scalings: Scalings,
    labels: Tensor | None = None,
    **network_arguments: Any,
) -> Tensor:
    """Return ``c_skip x + c_out network(c_in x, c_noise, labels)`` ``[N, C, H, W]``.

    ``network_arguments`` go to the network as they are (``augment_labels=...``).
    """
    raw = network(append_dims(scalings.c_in, x) * x, scalings.c_noise, labels, **network_arguments)
    return append_dims(scalings.c_skip, x) * x + append_dims(scalings.c_out, x) * raw
