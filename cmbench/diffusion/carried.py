"""The derivative of a consistency function along a trajectory, from its network's own tangent.

``f = c_skip x + c_out F(c_in x, c_noise)``. A network that carries tangents gives ``F`` (graded)
and ``dF`` (detached) in one pass; the scalings' derivatives are closed forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.preconditioning import boundary_scalings

#: ``(x_in, c_noise, dx_in, dc_noise, labels) -> (F graded, dF detached)``.
TangentCall = Callable[..., tuple[Tensor, Tensor]]


def boundary_consistency_tangent(
    network_with_tangent: TangentCall,
    x_sigma: Tensor,
    sigma: Tensor,
    slope: Tensor,
    sigma_data: float,
    sigma_min: float,
    labels: Tensor | None = None,
    **network_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Return ``f`` (graded) and ``d_sigma f + (d_x f) slope`` (detached), ``[N, C, H, W]``.

    EDM frame, ``sigma [N]``. Scalings are those of
    :func:`cmbench.diffusion.preconditioning.boundary_scalings`; with
    ``v = sigma^2 + sd^2`` and ``g = sigma - sigma_min`` their derivatives are
    ``c_in' = -sigma v^(-3/2)``, ``c_noise' = 1 / (4 sigma)``, ``c_skip' = -2 g c_skip^2 / sd^2``,
    ``c_out' = sd (v^(-1/2) - g sigma v^(-3/2))``. ``network_arguments`` go to the network as they
    are (``conditions=...``).
    """
    scalings = boundary_scalings(sigma, sigma_data, sigma_min)
    gap = sigma - torch.full_like(sigma, sigma_min)
    d_in = -sigma * scalings.c_in**3
    d_skip = -2 * gap * scalings.c_skip**2 / sigma_data**2
    d_out = sigma_data * (scalings.c_in + gap * d_in)

    def wide(value: Tensor) -> Tensor:
        return append_dims(value, x_sigma)

    raw, d_raw = network_with_tangent(
        wide(scalings.c_in) * x_sigma,
        scalings.c_noise,
        wide(d_in) * x_sigma + wide(scalings.c_in) * slope,
        1 / (4 * sigma),
        labels,
        **network_arguments,
    )
    value = wide(scalings.c_skip) * x_sigma + wide(scalings.c_out) * raw
    with torch.no_grad():
        tangent = (
            wide(d_skip) * x_sigma
            + wide(scalings.c_skip) * slope
            + wide(d_out) * raw
            + wide(scalings.c_out) * d_raw
        )
    return value, tangent
