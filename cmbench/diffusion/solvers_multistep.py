"""Multistep solvers of the PF-ODE around a denoiser: one evaluation per step, higher order.

Signatures and notation as in :mod:`cmbench.diffusion.solvers`. Orders hold for grids uniform in
``lambda = -ln sigma`` that end above 0 (:func:`cmbench.diffusion.grids.sampling_log_sigmas`). A
step to 0 is a first-order step: its ``h`` would be infinite. One step is always DDIM.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmbench.diffusion.frames import sigma_to_vp_time
from cmbench.diffusion.solvers import Denoiser, NoiseSampler, batch_sigma, ddim_step, ends_at_zero
from cmbench.errors import UserError


def _log_steps(sigmas: Tensor) -> Tensor:
    """Return ``h_i = ln(sigma_i / sigma_{i+1})``, infinite for a step to 0."""
    logs = sigmas.log()
    return logs[:-1] - logs[1:]


def _check_order(who: str, what: str, order: int, lowest: int, highest: int) -> None:
    if not lowest <= order <= highest:
        raise UserError(
            who, f"{what} {order}", allowed=f"{lowest} to {highest}", remedy="choose one of these"
        )


def _lower_order_final(chosen: bool | None, steps: int) -> bool:
    """Return the choice, or the released default: lower orders end fewer than 10 steps."""
    return steps < 10 if chosen is None else chosen


def dpm_solver_pp_2m(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    lower_order_final: bool | None = None,
) -> Tensor:
    """Solve by DPM-Solver++(2M): order 2, NFE = steps (Lu et al. 2022, arXiv:2211.01095, Alg. 2).

    The first step is first-order. ``lower_order_final`` makes the last step first-order too; the
    default does so below 10 steps, as released (Alg. 2 never does).
    """
    steps = _log_steps(sigmas)
    last = len(steps) - 1
    lower = ends_at_zero(sigmas) or _lower_order_final(lower_order_final, len(steps))
    previous: Tensor | None = None
    for i in range(len(steps)):
        denoised = denoise(x, batch_sigma(sigmas[i], x), labels)
        extrapolated = denoised
        if previous is not None and not (i == last and lower):
            weight = steps[i] / (2 * steps[i - 1])  # 1 / 2r
            extrapolated = denoised + weight * (denoised - previous)
        x = ddim_step(x, extrapolated, sigmas[i], sigmas[i + 1])
        previous = denoised
    return x


def dpm_solver_pp_3m(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    lower_order_final: bool | None = None,
    curvature: Literal["released", "exact"] = "released",
) -> Tensor:
    """Solve by DPM-Solver++(3M), NFE = steps (arXiv:2211.01095, as released).

    The released code, and those that follow it, give the second difference the weight ``phi_3``
    where integrating a quadratic gives twice that: its global order is 2. ``curvature="exact"``
    uses the latter and is of order 3. ``lower_order_final`` ends with orders 2, 1; the default does
    so below 10 steps, as released.
    """
    weight_3 = 2.0 if curvature == "exact" else 1.0
    steps = _log_steps(sigmas)
    count, to_zero = len(steps), ends_at_zero(sigmas)
    lower = _lower_order_final(lower_order_final, count)
    history: list[Tensor] = []
    for i in range(count):
        denoised = denoise(x, batch_sigma(sigmas[i], x), labels)
        history = [denoised, *history[:2]]
        order = min(3, i + 1, count - i if lower else 3)
        if order == 1 or (i == count - 1 and to_zero):
            x = ddim_step(x, denoised, sigmas[i], sigmas[i + 1])
        elif order == 2:
            weight = steps[i] / (2 * steps[i - 1])
            extrapolated = denoised + weight * (denoised - history[1])
            x = ddim_step(x, extrapolated, sigmas[i], sigmas[i + 1])
        else:
            x = _pp_step_3m(x, history, sigmas[i], sigmas[i + 1], steps[i - 2 : i + 1], weight_3)
    return x


def _pp_step_3m(
    x: Tensor, history: list[Tensor], sigma: Tensor, s: Tensor, steps: Tensor, weight_3: float
) -> Tensor:
    """One step from three slopes.

    ``history`` is newest first, ``steps`` holds ``h_{i-2}, h_{i-1}, h_i``. ``first`` is ``h D'``
    and ``second`` ``h^2 D'' / 2`` of the parabola through the history, in lambda.
    """
    h = steps[2]
    r0, r1 = steps[1] / h, steps[0] / h
    a = (history[0] - history[1]) / r0
    b = (history[1] - history[2]) / r1
    first = a + r0 / (r0 + r1) * (a - b)
    second = (a - b) / (r0 + r1)
    phi_1 = torch.expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    return (s / sigma) * x - phi_1 * history[0] + phi_2 * first - weight_3 * phi_3 * second


# --- DEIS ------------------------------------------------------------------------------------


@cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights: rounding even for one step over the whole range."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    return nodes, weights


def _deis_coefficients(past: Tensor, sigma: Tensor, sigma_next: Tensor) -> list[float]:
    """Return ``C_j``, the integrals over sigma of the Lagrange polynomials in VP time.

    ``past`` holds the noise levels of the slopes, newest first. The quadrature runs in
    ``ln sigma``, where the integrand is smooth.
    """
    nodes, weights = _quadrature()
    low, high = math.log(float(sigma)), math.log(float(sigma_next))
    points = np.exp((high - low) / 2 * nodes + (high + low) / 2)
    measure = (high - low) / 2 * weights * points  # d sigma
    tau = sigma_to_vp_time(torch.from_numpy(points)).numpy()
    tau_past = sigma_to_vp_time(past.double().cpu()).numpy()
    coefficients = []
    for j, node in enumerate(tau_past):
        others = np.delete(tau_past, j)[:, None]
        basis = np.prod((tau - others) / (node - others), axis=0)
        coefficients.append(float(measure @ basis))
    return coefficients


def deis_tab(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: int = 3,
) -> Tensor:
    """Solve by tAB-DEIS: polynomial extrapolation of the noise in VP time, NFE = steps.

    Zhang & Chen 2022 (arXiv:2204.13902), Sec. 3. ``order`` is the degree of the
    polynomial (``order + 1`` past slopes), rising in the first steps; 0 is DDIM, 3 the published
    3-DEIS (other code calls that maximal order 4). ``sigmas`` are best uniform in the root of VP
    time. A step to 0 is first-order.
    """
    _check_order("deis_tab", "degree", order, 0, 3)
    last, to_zero = len(sigmas) - 2, ends_at_zero(sigmas)
    slopes: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, batch_sigma(sigmas[i], x), labels)
        slopes = [(x - denoised) / sigmas[i], *slopes[:order]]
        if i == last and to_zero:
            return ddim_step(x, denoised, sigmas[i], sigmas[i + 1])
        past = sigmas[i - len(slopes) + 1 : i + 1].flip(0)
        for c, slope in zip(
            _deis_coefficients(past, sigmas[i], sigmas[i + 1]), slopes, strict=True
        ):
            x = x + c * slope
    return x


# --- UniPC -----------------------------------------------------------------------------------


def _unipc_weights(
    ratios: list[float], h: float, variant: Literal["bh1", "bh2"]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return ``B(h)`` and the weights of predictor and corrector (arXiv:2302.04867, Sec. 3).

    ``ratios`` are ``r_1 … r_{p-1}`` of the past points (below 0) and ``r_p = 1``; the predictor
    uses the first p - 1 equations and unknowns. Order 2 takes rho = 1/2 for the predictor, order
    1 for the corrector, whose equations have no other freedom.
    """
    order = len(ratios)
    z = -h
    big_b = z if variant == "bh1" else math.expm1(z)
    phi = math.expm1(z) / z
    b = np.empty(order)
    for j in range(1, order + 1):
        phi = (phi - 1 / math.factorial(j)) / z  # phi_{j+1} from phi_j
        b[j - 1] = math.factorial(j) * z * phi / big_b
    r = np.array([[ratio ** (j - 1) for ratio in ratios] for j in range(1, order + 1)])
    if order == 1:
        return big_b, np.empty(0), np.array([0.5])
    corrector = np.linalg.solve(r, b)
    predictor = np.array([0.5]) if order == 2 else np.linalg.solve(r[:-1, :-1], b[:-1])
    return big_b, predictor, corrector


def unipc(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: int = 3,
    variant: Literal["bh1", "bh2"] = "bh1",
    lower_order_final: bool = True,
) -> Tensor:
    """Solve by UniPC in data prediction: order p + 1 in effect, NFE = steps.

    Zhao et al. 2023 (arXiv:2302.04867), Sec. 3, in data prediction as released. The
    evaluation at the predicted point corrects it and then serves the next step; the last step has
    no corrector. The order rises in the first steps and, with ``lower_order_final``, falls in the
    last ones.
    """
    _check_order("unipc", "order", order, 1, 4)
    steps = _log_steps(sigmas).tolist()
    count, to_zero = len(steps), ends_at_zero(sigmas)
    history = [denoise(x, batch_sigma(sigmas[0], x), labels)]
    for i in range(count):
        sigma, sigma_next, newest = sigmas[i], sigmas[i + 1], history[0]
        now = min(order, i + 1, count - i if lower_order_final else order)
        base = ddim_step(x, newest, sigma, sigma_next)
        if i == count - 1 and to_zero:
            return base
        past = range(1, now)
        ratios = [-sum(steps[i - m : i]) / steps[i] for m in past]
        scale, predictor, corrector = _unipc_weights([*ratios, 1.0], steps[i], variant)
        changes = [(history[m] - newest) / ratios[m - 1] for m in past]
        predicted = base
        for weight, change in zip(predictor.tolist(), changes, strict=False):
            predicted = predicted - scale * weight * change
        if i == count - 1:
            return predicted
        fresh = denoise(predicted, batch_sigma(sigma_next, x), labels)
        x = base
        for weight, change in zip(corrector.tolist(), [*changes, fresh - newest], strict=True):
            x = x - scale * weight * change
        history = [fresh, *history[: order - 1]]
    return x
