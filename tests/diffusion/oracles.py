"""Closed forms and slow derivatives that the mathematics is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.preconditioning import Scalings


def gaussian_flow_map(
    mean: Tensor, std: Tensor, x_sigma: Tensor, sigma: Tensor, sigma_end: Tensor | float = 0.0
) -> Tensor:
    """The PF-ODE's closed-form flow map for one Gaussian.

    ``m + (x - m) sqrt((s^2 + sigma_end^2) / (s^2 + sigma^2))``, since ``x - m`` follows the
    standard deviation of the noisy data. Differentiable in both modes.
    """
    end = torch.as_tensor(sigma_end, dtype=sigma.dtype, device=sigma.device)
    variance_end = std**2 + append_dims(end, x_sigma) ** 2
    variance = std**2 + append_dims(sigma, x_sigma) ** 2
    return mean + (x_sigma - mean) * torch.sqrt(variance_end / variance)


def trigflow_scalings(t: Tensor, sigma_data: float) -> Scalings:
    """TrigFlow as ``c_skip x + c_out F(c_in x, c_noise)`` (arXiv:2410.11081, Sec. 3)."""
    return Scalings(
        c_skip=torch.cos(t),
        c_out=-sigma_data * torch.sin(t),
        c_in=torch.full_like(t, 1 / sigma_data),
        c_noise=t,
    )


def consistency_derivative(
    F: Tensor, dF_dt: Tensor, x_t: Tensor, dxt_dt: Tensor, t: Tensor, sigma_data: float
) -> Tensor:
    """``df/dt = -cos t (sd F - dx_t/dt) - sin t (x_t + sd dF/dt)`` (arXiv:2410.11081, Eq. 6)."""
    cosine, sine = append_dims(torch.cos(t), x_t), append_dims(torch.sin(t), x_t)
    return -cosine * (sigma_data * F - dxt_dt) - sine * (x_t + sigma_data * dF_dt)


def inverse_ddim(x_next: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The ``D`` whose DDIM step leads from ``x`` to ``x_next``.

    ``(sigma x_next - s x) / (sigma - s)`` (Salimans & Ho 2022, arXiv:2202.00512, App. G, in the EDM
    frame); it is ``x_next`` at ``s = 0``.
    """
    sigma, sigma_next = append_dims(sigma, x), append_dims(sigma_next, x)
    return (sigma * x_next - sigma_next * x) / (sigma - sigma_next)


TensorFunction = Callable[..., Tensor]
Jvp = Callable[[TensorFunction, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


def forward_mode_jvp(
    fn: TensorFunction, primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``fn(*primals)`` and its exact derivative along ``tangents``."""
    result: tuple[Tensor, Tensor] = torch.func.jvp(fn, tuple(primals), tuple(tangents))[:2]
    return result


def consistency_tangent(
    consistency: TensorFunction,
    x_sigma: Tensor,
    sigma: Tensor,
    slope: Tensor,
    labels: Tensor | None = None,
    *,
    jvp: Jvp = forward_mode_jvp,
) -> tuple[Tensor, Tensor]:
    """``f`` and its total derivative ``d_sigma f + (d_x f) slope`` along a trajectory.

    ``consistency(x, time, labels)`` in any frame, with the slope of that frame (Song et al. 2023,
    arXiv:2303.01469, Theorem 6).
    """
    return jvp(
        lambda x, time: consistency(x, time, labels),
        (x_sigma, sigma),
        (slope, torch.ones_like(sigma)),
    )


def central_difference_jvp(
    fn: TensorFunction, primals: Sequence[Tensor], tangents: Sequence[Tensor], h: float
) -> tuple[Tensor, Tensor]:
    """``fn(*primals)`` and ``(fn(p + h v) - fn(p - h v)) / 2h``, of error O(h^2)."""
    ahead = fn(*(p + h * v for p, v in zip(primals, tangents, strict=True)))
    behind = fn(*(p - h * v for p, v in zip(primals, tangents, strict=True)))
    return fn(*primals), (ahead - behind) / (2 * h)
