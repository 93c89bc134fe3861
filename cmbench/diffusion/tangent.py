"""The tangent of continuous-time consistency models, and the derivatives it is made of.

TrigFlow frame: ``z = sd eps``, ``x_t = cos(t) x0 + sin(t) z``, ``f = cos(t) x_t - sin(t) sd F``.
Images ``[N, C, H, W]``, times ``[N]``. Keep times, tangents and norms in float32 or float64.

Source: Lu & Song 2024 (arXiv:2410.11081), Eq. 6 and 8, Sec. 4 and 5.1, App. A; the 2023
pseudo-objective is from Song et al. (arXiv:2303.01469), Theorem 6 and App. B.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims, quarter_log_sigma

#: ``"l2"``: the vector norm of an image; ``"rms"``: that norm over the root of its size.
TangentNorm = Literal["l2", "rms"]


# --- the process -----------------------------------------------------------------------------


def trigflow_interpolate(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return images ``cos(t) x0 + sin(t) z``; ``z = sd eps``, ``t [N]`` (Sec. 3)."""
    t = append_dims(t, x0)
    return torch.cos(t) * x0 + torch.sin(t) * z


def trigflow_velocity_target(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return images ``cos(t) z - sin(t) x0``, the target of ``sd F`` and CT's slope; ``t [N]``."""
    t = append_dims(t, x0)
    return torch.cos(t) * z - torch.sin(t) * x0


# --- the rearranged tangent ------------------------------------------------------------------


class JvpInputs(NamedTuple):
    """Inputs of a raw network and the rearranged tangents to push through it.

    Attributes:
        x_in: ``x_t / sd``, ``[N, C, H, W]``.
        c_noise: what the network receives as time, ``[N]``.
        dx_in: ``cos t sin t (dx_t/dt) / sd``, ``[N, C, H, W]``.
        dc_noise: ``cos t sin t (d c_noise/dt)``, ``[N]``.

    """

    x_in: Tensor
    c_noise: Tensor
    dx_in: Tensor
    dc_noise: Tensor


def jvp_inputs(
    t: Tensor,
    dx_dt: Tensor,
    x_t: Tensor,
    sigma_data: float,
    *,
    noise_embedding: Literal["t", "log-sigma"] = "t",
) -> JvpInputs:
    """Return inputs and tangents whose JVP is ``cos t sin t dF/dt`` (Sec. 5.1).

    With the factor inside the tangents nothing overflows near 0 and pi/2. The JVP lacks ``sd``
    (it is the derivative of F, not of ``sd F``): :func:`rearranged_tangent` multiplies it in. The
    paper's displayed tangents give ``sd`` times as much while its left-hand side omits ``sd``;
    combining the two counts ``sd`` twice.

    For ``"log-sigma"``, EDM's ``c_noise = ln(sd tan t) / 4``, the time tangent is exactly 1/4.
    """
    factor = torch.cos(t) * torch.sin(t)
    dx_in = append_dims(factor / sigma_data, x_t) * dx_dt
    if noise_embedding == "t":
        return JvpInputs(x_t / sigma_data, t, dx_in, factor)
    noise = quarter_log_sigma(t, sigma_data)
    return JvpInputs(x_t / sigma_data, noise, dx_in, torch.full_like(t, 0.25))


def rearranged_tangent(
    F: Tensor,
    dF: Tensor,
    x_t: Tensor,
    dxt_dt: Tensor,
    t: Tensor,
    warmup_r: float | Tensor,
    sigma_data: float,
) -> Tensor:
    """Return ``g = -cos^2 t (sd F - dx_t/dt) - r (cos t sin t x_t + sd dF)`` (App. A, line 8).

    Args:
        F: raw output of the stop-gradient network at ``(x_t / sd, c_noise)``.
        dF: its JVP with the tangents of :func:`jvp_inputs`, ``cos t sin t dF/dt`` (without sd).
        x_t: noisy images.
        dxt_dt: ODE slope, from data and noise (CT) or a teacher (CD).
        t: angles ``[N]``.
        warmup_r: see :func:`warmup`; 0 is diffusion training, 1 the full tangent.
        sigma_data: standard deviation of the data.

    At ``r = 1`` this is ``cos(t) df/dt``: the prior weight ``1 / (sd tan t)`` is already inside.

    """
    cosine, sine = append_dims(torch.cos(t), x_t), append_dims(torch.sin(t), x_t)
    diffusion = -(cosine**2) * (sigma_data * F - dxt_dt)
    return diffusion - warmup_r * (cosine * sine * x_t + sigma_data * dF)


def discrete_tangent(f_t: Tensor, f_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return images ``(f(x_t, t) - f(x_s, s)) / sin(t - s)``; ``t``, ``s [N]`` (Fig. 5c)."""
    return (f_t - f_s) / append_dims(torch.sin(t - s), f_t)


def image_norm(g: Tensor, norm: TangentNorm = "l2") -> Tensor:
    """Return the norm of each image, ``[N]``: of the vector, or per value (root mean square)."""
    values = g.flatten(1)
    vector: Tensor = torch.linalg.vector_norm(values, dim=1)
    return vector if norm == "l2" else vector / math.sqrt(values.shape[1])


def normalize_tangent(g: Tensor, c: float = 0.1, norm: TangentNorm = "l2") -> Tensor:
    """Return images ``g / (||g|| + c)``, each by its own norm (Sec. 4.2; App. A, line 9).

    The paper does not say which norm. ``"l2"`` and ``"rms"`` differ by the root of an image's size
    in scale and in where ``c`` bites, so record which was used. Normalising ends the equality of
    the expected CT tangent with the CD tangent.
    """
    return g / (append_dims(image_norm(g, norm), g) + c)


def clip_tangent(g: Tensor, bound: float = 1.0) -> Tensor:
    """Return ``g`` clipped to ``[-bound, bound]``, the alternative to normalising (Sec. 4.2)."""
    return g.clamp(-bound, bound)


def warmup(step: int, warmup_steps: int) -> float:
    """Return ``r = min(1, step / warmup_steps)``, 1 without a warm-up (Sec. 4.2)."""
    return 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)


# --- the continuous-time pseudo-objective of 2023 (EDM frame) --------------------------------


def oracle_ode_slope(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Return images ``(x_sigma - x0) / sigma``: the ODE slope from data or a denoiser's output.

    With ``x0`` it is the unbiased estimate of consistency training, with ``D(x_sigma, sigma)`` the
    PF-ODE of distillation (arXiv:2303.01469, Eq. 2 and Theorem 6); ``sigma`` > 0.
    """
    return (x_sigma - x0) / append_dims(sigma, x_sigma)


def pseudo_objective(
    output: Tensor, tangent: Tensor, weight: Tensor | float = 1.0, hessian: Tensor | float = 2.0
) -> Tensor:
    """Return ``w f . sg(H df/dsigma)`` ``[N]``, summed over values (arXiv:2303.01469, Thm 6).

    Its value means nothing; its gradient is that of the consistency loss as the grid becomes
    infinitely fine. ``hessian`` is the metric's Hessian at zero distance, where that is a multiple
    of one: 2 for the squared l2, ``1 / c`` for pseudo-Huber.
    """
    return weight * (output * (hessian * tangent).detach()).flatten(1).sum(1)
