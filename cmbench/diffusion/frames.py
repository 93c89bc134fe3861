"""Time frames and parameterizations: EDM, TrigFlow, rectified flow and VP.

Shapes: images ``[N, C, H, W]``, times and noise levels ``[N]``; any float dtype, results keep it.
``sd`` is ``sigma_data``, the standard deviation of the data (0.5 in the papers). Unit noise ``eps``
is N(0, I); TrigFlow's ``z = sd * eps`` carries ``sd``.

=============  =====================================  ===========================================
frame          noisy image                            network target
=============  =====================================  ===========================================
EDM            ``x_sigma = x0 + sigma eps``           ``denoised`` (an estimate of ``x0``)
TrigFlow       ``x_t = cos(t) x0 + sin(t) z``         ``velocity = cos(t) z - sin(t) x0 = sd F``
VP             ``x_vp = alpha x0 + beta eps``         ``eps`` or ``v = alpha eps - beta x0``
flow           ``x_t = t x0 + (1 - t) eps``           ``velocity = x0 - eps``
=============  =====================================  ===========================================

Sources: EDM, Karras et al. 2022 (arXiv:2206.00364); TrigFlow, Lu & Song 2024 (arXiv:2410.11081),
Sec. 3 and App. B.2 (bare section numbers below are of the latter).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Linear-beta VP SDE of Song et al. 2021 (arXiv:2011.13456), App. C: beta from 0.1 to 20.
VP_BETA_MIN = 0.1
VP_BETA_MAX = 20.0


def append_dims(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t [N]`` with trailing axes of one, to broadcast over ``x``.

    A scalar stays one: it broadcasts as it is, and a float64 scalar leaves a float32 image float32.
    """
    return t if t.ndim == 0 else t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def tiny(t: Tensor) -> float:
    """Return the smallest normal number of ``t``'s dtype: a floor that keeps logarithms finite."""
    return float(torch.finfo(t.dtype).tiny)


# --- noise level <-> angle -------------------------------------------------------------------


def sigma_to_t(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return the TrigFlow angle ``t = arctan(sigma / sd)`` in [0, pi/2) (2410.11081, App. B.2)."""
    return torch.atan(sigma / sigma_data)


def t_to_sigma(t: Tensor, sigma_data: float) -> Tensor:
    """Return the EDM noise level ``sigma = sd tan(t)`` of an angle ``t`` in [0, pi/2)."""
    return torch.tan(t) * sigma_data


def quarter_log_sigma(t: Tensor, sigma_data: float) -> Tensor:
    """Return EDM's ``c_noise = ln(sd tan t) / 4`` of an angle, finite on all of [0, pi/2].

    The sine and cosine are floored at the smallest normal number: float32's pi/2 lies beyond pi/2,
    where the tangent is negative.
    """
    floor = tiny(t)
    ratio = torch.log(torch.sin(t).clamp_min(floor)) - torch.log(torch.cos(t).clamp_min(floor))
    return (ratio + math.log(sigma_data)) / 4


def edm_to_trig(x_sigma: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return images ``x_t = cos(t) x_sigma`` and angles ``t [N]`` of an EDM pair (App. B.2).

    The cosine is computed as ``sd / sqrt(sigma^2 + sd^2)``, which keeps full relative precision at
    large ``sigma`` where ``cos(arctan(.))`` cancels.
    """
    cos_t = sigma_data / torch.sqrt(sigma**2 + sigma_data**2)
    return append_dims(cos_t, x_sigma) * x_sigma, sigma_to_t(sigma, sigma_data)


def trig_to_edm(x_t: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return images ``x_sigma = x_t / cos(t)`` and ``sigma [N]`` of a TrigFlow pair."""
    return x_t / append_dims(torch.cos(t), x_t), t_to_sigma(t, sigma_data)


# --- TrigFlow predictions --------------------------------------------------------------------


def denoised_to_velocity(x_t: Tensor, t: Tensor, denoised: Tensor) -> Tensor:
    """Return images ``sd F = (cos(t) x_t - D) / sin(t)`` (Sec. 3); ``t [N]`` in (0, pi/2].

    The quotient cancels at small ``t``; with the raw network at hand use
    :meth:`cmbench.diffusion.models.EDMModel.velocity`, which does not divide.
    """
    t = append_dims(t, x_t)
    return (torch.cos(t) * x_t - denoised) / torch.sin(t)


def velocity_to_denoised(x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Return images ``D = cos(t) x_t - sin(t) sd F`` (Sec. 3); ``t [N]``."""
    t = append_dims(t, x_t)
    return torch.cos(t) * x_t - torch.sin(t) * velocity


def predictions_to_velocity(
    t: Tensor, denoised: Tensor, epsilon: Tensor, sigma_data: float
) -> Tensor:
    """Return images ``sd F = cos(t) sd eps - sin(t) D``; ``t [N]`` (2410.11081, App. B.2)."""
    t = append_dims(t, denoised)
    return torch.cos(t) * sigma_data * epsilon - torch.sin(t) * denoised


# --- rectified flow --------------------------------------------------------------------------


def flow_interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return images ``x_t = t x0 + (1 - t) eps`` (Liu et al. 2022, arXiv:2209.03003, Sec. 2.1).

    Its clock: ``t [N]`` is 0 at noise and 1 at data. Many later papers run it the other way.
    """
    t = append_dims(t, x0)
    return t * x0 + (1 - t) * eps


def flow_time_to_sigma(t: Tensor) -> Tensor:
    """Return the EDM noise level ``(1 - t) / t`` of a flow's time in (0, 1]; ``x_t / t`` has it."""
    return (1 - t) / t


def sigma_to_flow_time(sigma: Tensor) -> Tensor:
    """Return the flow's time ``1 / (1 + sigma)``: the inverse of :func:`flow_time_to_sigma`."""
    return 1 / (1 + sigma)


# --- variance preserving ---------------------------------------------------------------------


def edm_to_vp(x_sigma: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return images ``x_vp`` and ``alpha``, ``beta`` ``[N]`` (``alpha^2 + beta^2 = 1``)."""
    alpha = 1 / torch.sqrt(1 + sigma**2)
    return append_dims(alpha, x_sigma) * x_sigma, alpha, sigma * alpha


def vp_time_to_sigma(tau: Tensor) -> Tensor:
    """Return ``sigma(tau) = sqrt(exp(19.9 tau^2 / 2 + 0.1 tau) - 1)``, ``[N]``: the linear VP SDE.

    ``tau`` in [0, 1]; Song et al. 2021, App. C, as sigma of Karras et al. 2022, Table 1.
    """
    exponent = 0.5 * (VP_BETA_MAX - VP_BETA_MIN) * tau**2 + VP_BETA_MIN * tau
    return torch.sqrt(torch.expm1(exponent))


def sigma_to_vp_time(sigma: Tensor) -> Tensor:
    """Return the VP time ``[N]`` of noise levels: the inverse of :func:`vp_time_to_sigma`."""
    slope = VP_BETA_MAX - VP_BETA_MIN
    log_term = torch.log1p(sigma**2)
    # The root of slope/2 tau^2 + beta_min tau = log_term, in the form that does not cancel.
    return 2 * log_term / (VP_BETA_MIN + torch.sqrt(VP_BETA_MIN**2 + 2 * slope * log_term))


def cosine_time_to_sigma(u: Tensor, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> Tensor:
    """Return ``sigma`` of the truncated cosine schedule ``logsnr = -2 ln tan(a u + b)``.

    ``u`` in [0, 1] from data to noise; Salimans & Ho 2022 (arXiv:2202.00512), as released. With the
    published range the ends are ``exp(-10)`` and ``exp(10)``, not 0.002 and 80.
    """
    b = math.atan(math.exp(-0.5 * logsnr_max))
    a = math.atan(math.exp(-0.5 * logsnr_min)) - b
    return torch.tan(a * u + b)
