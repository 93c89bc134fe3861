"""Time frames and parameterisations: EDM, TrigFlow, rectified flow and VP.

Shapes: images ``[N, C, H, W]``, times and noise levels ``[N]``; any float dtype, results keep it.
``sd`` is ``sigma_data``, the standard deviation of the data (0.5 in the papers). Unit noise ``eps``
is N(0, I); TrigFlow's ``z = sd * eps`` carries ``sd``.

=============  =====================================  ===========================================
frame          noisy image                            network target
=============  =====================================  ===========================================
EDM            ``x_sigma = x0 + sigma eps``           ``denoised`` (an estimate of ``x0``)
TrigFlow       ``x_t = cos(t) x0 + sin(t) z``         ``velocity = cos(t) z - sin(t) x0 = sd F``
rectified flow ``x_s = (1 - s) x0 + s eps``           ``u = eps - x0``
VP             ``x_vp = alpha x0 + beta eps``         ``eps`` or ``v = alpha eps - beta x0``
=============  =====================================  ===========================================

Sources: EDM, Karras et al. 2022 (arXiv:2206.00364); TrigFlow, Lu & Song 2024 (arXiv:2410.11081),
Sec. 3 and App. B.2.
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
    """Return ``(x_t, t)`` of an EDM pair: ``x_t = cos(t) x_sigma`` (2410.11081, App. B.2).

    The cosine is computed as ``sd / sqrt(sigma^2 + sd^2)``, which keeps full relative precision at
    large ``sigma`` where ``cos(arctan(.))`` cancels.
    """
    cos_t = sigma_data / torch.sqrt(sigma**2 + sigma_data**2)
    return append_dims(cos_t, x_sigma) * x_sigma, sigma_to_t(sigma, sigma_data)


def trig_to_edm(x_t: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return ``(x_sigma, sigma)`` of a TrigFlow pair: ``x_sigma = x_t / cos(t)``."""
    return x_t / append_dims(torch.cos(t), x_t), t_to_sigma(t, sigma_data)


# --- TrigFlow predictions --------------------------------------------------------------------


def denoised_to_velocity(x_t: Tensor, t: Tensor, denoised: Tensor) -> Tensor:
    """Return ``sd F = (cos(t) x_t - D) / sin(t)`` (2410.11081, Sec. 3); ``t`` in (0, pi/2].

    The quotient cancels at small ``t``; with the raw network at hand use
    :meth:`cmbench.diffusion.models.EDMModel.velocity`, which does not divide.
    """
    t = append_dims(t, x_t)
    return (torch.cos(t) * x_t - denoised) / torch.sin(t)


def velocity_to_denoised(x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Return ``D = cos(t) x_t - sin(t) sd F`` (2410.11081, Sec. 3)."""
    t = append_dims(t, x_t)
    return torch.cos(t) * x_t - torch.sin(t) * velocity


def velocity_to_epsilon(x_t: Tensor, t: Tensor, velocity: Tensor, sigma_data: float) -> Tensor:
    """Return unit noise ``eps = (sin(t) x_t + cos(t) sd F) / sd`` (2410.11081, App. B.2)."""
    t = append_dims(t, x_t)
    return (torch.sin(t) * x_t + torch.cos(t) * velocity) / sigma_data


def predictions_to_velocity(
    t: Tensor, denoised: Tensor, epsilon: Tensor, sigma_data: float
) -> Tensor:
    """Return ``sd F = cos(t) sd eps - sin(t) D`` from both predictions (2410.11081, App. B.2)."""
    t = append_dims(t, denoised)
    return torch.cos(t) * sigma_data * epsilon - torch.sin(t) * denoised


def affine_to_trig(
    x: Tensor, signal: Tensor, noise: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """Return ``(x_t, t)`` of any ``x = signal x0 + noise eps`` (2410.11081, App. B.2).

    ``t = arctan2(noise, signal sd)`` and ``x_t = sd x / sqrt(signal^2 sd^2 + noise^2)``;
    ``signal`` may be zero.
    """
    scale = sigma_data / torch.sqrt((signal * sigma_data) ** 2 + noise**2)
    return append_dims(scale, x) * x, torch.atan2(noise, signal * sigma_data)


# --- rectified flow --------------------------------------------------------------------------


def t_to_flow_time(t: Tensor, sigma_data: float) -> Tensor:
    """Return ``s = sd tan t / (1 + sd tan t)`` in [0, 1], written without the tangent's pole."""
    sine = sigma_data * torch.sin(t)
    return sine / (torch.cos(t) + sine)


def flow_time_to_t(s: Tensor, sigma_data: float) -> Tensor:
    """Return the TrigFlow angle of a flow time ``s`` in [0, 1] (0 is data, 1 is noise)."""
    return torch.atan2(s, (1 - s) * sigma_data)


def flow_to_trig(x_s: Tensor, s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return ``(x_t, t)`` of a rectified-flow pair, ``x_s = (1 - s) x0 + s eps``."""
    return affine_to_trig(x_s, 1 - s, s, sigma_data)


def trig_to_flow(x_t: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return the rectified-flow pair ``(x_s, s)`` of a TrigFlow pair."""
    s = t_to_flow_time(t, sigma_data)
    scale = torch.sqrt(((1 - s) * sigma_data) ** 2 + s**2) / sigma_data
    return append_dims(scale, x_t) * x_t, s


def flow_velocity_to_trig(x_s: Tensor, s: Tensor, u: Tensor, sigma_data: float) -> Tensor:
    """Return ``sd F`` from a flow prediction ``u = eps - x0`` (2410.11081, App. B.2 applied).

    ``sd F = [((1-s) sd^2 - s) x_s + ((1-s)^2 sd^2 + s^2) u] / sqrt((1-s)^2 sd^2 + s^2)``; at
    ``sd = 1`` this is the transformation of SANA-Sprint (arXiv:2503.09641).
    """
    s = append_dims(s, x_s)
    variance = ((1 - s) * sigma_data) ** 2 + s**2
    return (((1 - s) * sigma_data**2 - s) * x_s + variance * u) / torch.sqrt(variance)


def trig_velocity_to_flow(x_t: Tensor, t: Tensor, velocity: Tensor, sigma_data: float) -> Tensor:
    """Return the flow prediction ``u = eps - x0`` of a TrigFlow velocity ``sd F``."""
    epsilon = velocity_to_epsilon(x_t, t, velocity, sigma_data)
    return epsilon - velocity_to_denoised(x_t, t, velocity)


# --- variance preserving ---------------------------------------------------------------------


def vp_to_edm(x_vp: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(x_vp / alpha, beta / alpha)``, the EDM pair of ``x_vp = alpha x0 + beta eps``."""
    return x_vp / append_dims(alpha, x_vp), beta / alpha


def edm_to_vp(x_sigma: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(x_vp, alpha, beta)`` with ``alpha^2 + beta^2 = 1`` of an EDM pair."""
    alpha = 1 / torch.sqrt(1 + sigma**2)
    return append_dims(alpha, x_sigma) * x_sigma, alpha, sigma * alpha


def epsilon_to_denoised(x_vp: Tensor, alpha: Tensor, beta: Tensor, epsilon: Tensor) -> Tensor:
    """Return ``x0 = (x_vp - beta eps) / alpha`` (Ho et al. 2020, arXiv:2006.11239, Eq. 15)."""
    return (x_vp - append_dims(beta, x_vp) * epsilon) / append_dims(alpha, x_vp)


def v_to_denoised(x_vp: Tensor, alpha: Tensor, beta: Tensor, v: Tensor) -> Tensor:
    """Return ``x0 = alpha x_vp - beta v`` for ``v = alpha eps - beta x0``.

    Salimans & Ho 2022 (arXiv:2202.00512), App. D; needs ``alpha^2 + beta^2 = 1``.
    """
    return append_dims(alpha, x_vp) * x_vp - append_dims(beta, x_vp) * v


def v_to_epsilon(x_vp: Tensor, alpha: Tensor, beta: Tensor, v: Tensor) -> Tensor:
    """Return ``eps = beta x_vp + alpha v`` (arXiv:2202.00512, App. D)."""
    return append_dims(beta, x_vp) * x_vp + append_dims(alpha, x_vp) * v


def denoised_to_v(x_vp: Tensor, alpha: Tensor, beta: Tensor, denoised: Tensor) -> Tensor:
    """Return ``v = (alpha x_vp - x0) / beta``, the inverse of :func:`v_to_denoised`."""
    return (append_dims(alpha, x_vp) * x_vp - denoised) / append_dims(beta, x_vp)


def vp_time_to_sigma(tau: Tensor) -> Tensor:
    """Return ``sigma(tau) = sqrt(exp(19.9 tau^2 / 2 + 0.1 tau) - 1)`` of the linear VP SDE.

    ``tau`` in [0, 1]; Song et al. 2021, App. C, as sigma of Karras et al. 2022, Table 1.
    """
    exponent = 0.5 * (VP_BETA_MAX - VP_BETA_MIN) * tau**2 + VP_BETA_MIN * tau
    return torch.sqrt(torch.expm1(exponent))


def sigma_to_vp_time(sigma: Tensor) -> Tensor:
    """Return the VP time of a noise level, the inverse of :func:`vp_time_to_sigma`."""
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
