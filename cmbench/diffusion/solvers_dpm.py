"""DPM-Solver and DPM-Solver++: single-step and multistep, noise and data prediction.

Signatures and notation as in :mod:`cmbench.diffusion.solvers`. DPM-Solver extrapolates the noise
``e`` in ``lambda = -ln sigma``, DPM-Solver++ the denoised images ``D``. Orders hold for grids
uniform in ``lambda`` that end above 0 (:func:`cmbench.diffusion.grids.sampling_log_sigmas`). A step
to 0 is a first-order step: its ``h`` would be infinite. One step is always DDIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cmbench.diffusion.solvers import (
    Denoiser,
    NoiseSampler,
    Prediction,
    as_prediction,
    batch_sigma,
    ddim_step,
    ends_at_zero,
    linear_step,
    log_steps,
)
from cmbench.errors import UserError


def _scale(prediction: Prediction, sigma_next: Tensor) -> Tensor | float:
    """Return what multiplies the terms of the integral over a step: 1, or the next sigma."""
    return 1.0 if prediction == "data" else sigma_next


def _signed(prediction: Prediction, h: Tensor) -> Tensor:
    """Return ``z``: -h for data, h for noise. Both predictions have one formula in it."""
    return -h if prediction == "data" else h


# --- single-step -----------------------------------------------------------------------------


def _value(
    denoise: Denoiser, x: Tensor, sigma: Tensor, labels: Tensor | None, prediction: Prediction
) -> Tensor:
    return as_prediction(prediction, denoise(x, batch_sigma(sigma, x), labels), x, sigma)


def _dpm_step_2(
    denoise: Denoiser,
    x: Tensor,
    sigma: Tensor,
    s: Tensor,
    labels: Tensor | None,
    prediction: Prediction,
) -> Tensor:
    """DPM-Solver-2 with r = 1/2 (Lu et al. 2022, arXiv:2206.00927, Algorithm 1)."""
    middle = torch.sqrt(sigma * s)
    value = _value(denoise, x, sigma, labels, prediction)
    guess = linear_step(prediction, x, value, sigma, middle)
    between = _value(denoise, guess, middle, labels, prediction)
    return linear_step(prediction, x, between, sigma, s)


def _dpm_step_3(
    denoise: Denoiser,
    x: Tensor,
    sigma: Tensor,
    s: Tensor,
    labels: Tensor | None,
    prediction: Prediction,
) -> Tensor:
    """DPM-Solver-3 with r1 = 1/3, r2 = 2/3 (Lu et al. 2022, Algorithm 2)."""
    r1, r2 = 1 / 3, 2 / 3
    z = _signed(prediction, torch.log(sigma / s))
    m1, m2 = sigma ** (1 - r1) * s**r1, sigma ** (1 - r2) * s**r2
    value = _value(denoise, x, sigma, labels, prediction)
    u1 = linear_step(prediction, x, value, sigma, m1)
    change_1 = _value(denoise, u1, m1, labels, prediction) - value
    phi_middle = torch.expm1(r2 * z) / (r2 * z) - 1
    u2 = linear_step(prediction, x, value, sigma, m2)
    u2 = u2 - _scale(prediction, m2) * (r2 / r1) * phi_middle * change_1
    change_2 = _value(denoise, u2, m2, labels, prediction) - value
    end = linear_step(prediction, x, value, sigma, s)
    return end - (_scale(prediction, s) / r2) * (torch.expm1(z) / z - 1) * change_2


def dpm_solver_singlestep(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    orders: Sequence[int],
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    prediction: Prediction = "noise",
) -> Tensor:
    """Solve with DPM-Solver of the given order (1, 2 or 3) in each step; NFE = sum of orders.

    Lu et al. 2022 (arXiv:2206.00927), Sec. 3; with data prediction DPM-Solver++(2S) and (3S)
    (arXiv:2211.01095, Algorithm 1). A step to 0 counts as order 1 whatever is asked: its ``h`` is
    infinite. See :func:`singlestep_orders` for the orders that spend an NFE budget.
    """
    if len(orders) != len(sigmas) - 1 or not set(orders) <= {1, 2, 3}:
        raise UserError(
            "dpm_solver_singlestep",
            f"orders {list(orders)} for {len(sigmas) - 1} steps",
            allowed="1, 2 or 3 for each step",
            remedy="give one order per step",
        )
    last = len(sigmas) - 2
    to_zero = ends_at_zero(sigmas)
    for step, order in enumerate(orders):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        if order == 1 or (step == last and to_zero):
            x = ddim_step(x, denoise(x, batch_sigma(sigma, x), labels), sigma, sigma_next)
        else:
            advance = _dpm_step_2 if order == 2 else _dpm_step_3
            x = advance(denoise, x, sigma, sigma_next, labels, prediction)
    return x


def singlestep_orders(nfe: int, order: int = 3) -> tuple[int, ...]:
    """Return orders up to ``order`` (2 or 3) that sum to ``nfe``, for steps uniform in lambda.

    Order 3 is DPM-Solver-fast: as many third-order steps as fit, then 2 and 1, 1, or 2 (Lu et al.
    2022, Sec. 3.4); NFE 10 is 3, 3, 3, 1. Order 2 ends an odd ``nfe`` with a first-order step.
    """
    if nfe < 1:
        raise UserError(
            "singlestep_orders", f"NFE {nfe}", allowed="1 or more", remedy="ask for at least one"
        )
    full, rest = divmod(nfe, order)
    if rest or order == 2:
        return (order,) * full + (rest,) * (rest > 0)
    return (3,) * (full - 1) + (2, 1)


# --- multistep -------------------------------------------------------------------------------


def _lower_order_final(chosen: bool | None, steps: int) -> bool:
    """Return the choice, or the released default: lower orders end fewer than 10 steps."""
    return steps < 10 if chosen is None else chosen


def dpm_solver_multistep(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: Literal[2, 3] = 2,
    prediction: Prediction = "data",
    lower_order_final: bool | None = None,
    curvature: Literal["released", "exact"] = "released",
) -> Tensor:
    """Solve by DPM-Solver++(2M) or (3M), NFE = steps (Lu et al. 2022, arXiv:2211.01095, Alg. 2).

    With noise prediction, the multistep DPM-Solver of the same authors. The order rises in the
    first steps. ``lower_order_final`` lowers it in the last ones too, to 1 in the last; the default
    does so below 10 steps, as released (Alg. 2 never does).

    The released code of order 3, and those that follow it, give the second difference the weight
    ``phi_3`` where integrating a quadratic gives twice that: its global order is 2.
    ``curvature="exact"`` uses the latter and is of order 3.
    """
    weight_3 = 2.0 if curvature == "exact" else 1.0
    steps = log_steps(sigmas)
    count, to_zero = len(steps), ends_at_zero(sigmas)
    lower = _lower_order_final(lower_order_final, count)
    history: list[Tensor] = []
    for i in range(count):
        sigma, s = sigmas[i], sigmas[i + 1]
        denoised = denoise(x, batch_sigma(sigma, x), labels)
        history = [as_prediction(prediction, denoised, x, sigma), *history[:2]]
        now = min(order, i + 1, count - i if lower else order)
        if now == 1 or (i == count - 1 and to_zero):
            x = ddim_step(x, denoised, sigma, s)
        elif now == 2:
            weight = steps[i] / (2 * steps[i - 1])  # 1 / 2r
            extrapolated = history[0] + weight * (history[0] - history[1])
            x = linear_step(prediction, x, extrapolated, sigma, s)
        else:
            x = _multistep_3(prediction, x, history, sigma, s, steps[i - 2 : i + 1], weight_3)
    return x


def _multistep_3(
    prediction: Prediction,
    x: Tensor,
    history: list[Tensor],
    sigma: Tensor,
    s: Tensor,
    steps: Tensor,
    weight_3: float,
) -> Tensor:
    """One step from three values.

    ``history`` is newest first, ``steps`` holds ``h_{i-2}, h_{i-1}, h_i``. ``first`` is ``h v'``
    and ``second`` ``h^2 v'' / 2`` of the parabola through the history, in lambda.
    """
    h = steps[2]
    r0, r1 = steps[1] / h, steps[0] / h
    a = (history[0] - history[1]) / r0
    b = (history[1] - history[2]) / r1
    first = a + r0 / (r0 + r1) * (a - b)
    second = (a - b) / (r0 + r1)
    z = _signed(prediction, h)
    psi_1 = torch.expm1(z)
    psi_2 = psi_1 / z - 1
    psi_3 = psi_2 / z - 0.5
    carried = (s / sigma) * x if prediction == "data" else x
    change = psi_1 * history[0] + psi_2 * first + weight_3 * psi_3 * second
    return carried - _scale(prediction, s) * change
