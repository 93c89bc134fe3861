"""UniPC: a predictor and corrector of any order at one evaluation per step.

Signature and notation as in :mod:`cmbench.diffusion.solvers`. Orders hold for grids uniform in
``lambda = -ln sigma`` that end above 0. A step to 0 is a first-order step. One step is always DDIM.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from torch import Tensor

from cmbench.diffusion.solvers import (
    Denoiser,
    NoiseSampler,
    Prediction,
    as_prediction,
    batch_sigma,
    check_order,
    ddim_step,
    ends_at_zero,
    linear_step,
    log_steps,
)


def _unipc_weights(
    ratios: list[float], z: float, variant: Literal["bh1", "bh2"]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return ``B(z)`` and the weights of predictor and corrector (arXiv:2302.04867, Sec. 3).

    ``z`` is -h in data prediction, h in noise prediction.
    ``ratios`` are ``r_1 … r_{p-1}`` of the past points (below 0) and ``r_p = 1``; the predictor
    uses the first p - 1 equations and unknowns. Order 2 takes rho = 1/2 for the predictor, order
    1 for the corrector, whose equations have no other freedom.
    """
    order = len(ratios)
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
    prediction: Prediction = "data",
    lower_order_final: bool = True,
) -> Tensor:
    """Solve by UniPC: order p + 1 in effect, NFE = steps (Zhao et al. 2023, arXiv:2302.04867).

    Sec. 3 as released, in data prediction by default. The evaluation at the predicted point
    corrects it and then serves the next step; the last step has no corrector. The order rises in
    the first steps and, with ``lower_order_final``, falls in the last ones.
    """
    check_order("unipc", "order", order, 1, 4)
    steps = log_steps(sigmas).tolist()
    count, to_zero = len(steps), ends_at_zero(sigmas)
    denoised = denoise(x, batch_sigma(sigmas[0], x), labels)
    history = [as_prediction(prediction, denoised, x, sigmas[0])]
    for i in range(count):
        sigma, sigma_next, newest = sigmas[i], sigmas[i + 1], history[0]
        if i == count - 1 and to_zero:
            return ddim_step(x, denoised, sigma, sigma_next)
        now = min(order, i + 1, count - i if lower_order_final else order)
        base = linear_step(prediction, x, newest, sigma, sigma_next)
        ratios = [-sum(steps[i - m : i]) / steps[i] for m in range(1, now)]
        z = -steps[i] if prediction == "data" else steps[i]
        big_b, predictor, corrector = _unipc_weights([*ratios, 1.0], z, variant)
        scale = big_b if prediction == "data" else big_b * sigma_next
        changes = [(history[m] - newest) / ratios[m - 1] for m in range(1, now)]
        predicted = base
        for weight, change in zip(predictor.tolist(), changes, strict=False):
            predicted = predicted - scale * weight * change
        if i == count - 1:
            return predicted
        denoised = denoise(predicted, batch_sigma(sigma_next, x), labels)
        fresh = as_prediction(prediction, denoised, predicted, sigma_next)
        x = base
        for weight, change in zip(corrector.tolist(), [*changes, fresh - newest], strict=True):
            x = x - scale * weight * change
        history = [fresh, *history[: order - 1]]
    return x
