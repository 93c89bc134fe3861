"""SA-Solver: a stochastic Adams predictor and corrector.

Xue et al. 2023 (arXiv:2309.05019), in data prediction and the EDM frame; signature and notation as
in :mod:`cmbench.diffusion.solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cmbench.diffusion.solvers import (
    Denoiser,
    NoiseSampler,
    batch_sigma,
    check_order,
    ddim_step,
    ends_at_zero,
    required_noise,
)
from cmbench.diffusion.solvers_adams import gauss_legendre, lagrange_integrals

#: ``tau(sigma)``: how much noise a step to ``sigma`` adds; 0 is the PF-ODE, 1 the reverse SDE.
Stochasticity = Callable[[float], float]


def middle_tau(sigma: float) -> float:
    """Return 1 for sigma in [0.05, 1], else 0: the paper's choice for EDM's networks."""
    return float(0.05 <= sigma <= 1)


class _Step:
    """One step from ``lambdas[0]`` to ``lambdas[1]``, with the noise it adds.

    ``x' = e^{-tau^2 h} (s / sigma) x + sum_j w_j D_j + s sqrt(1 - e^{-2 tau^2 h}) n``, where ``w``
    integrates ``(1 + tau^2) e^{(1 + tau^2)(lambda - lambda_s)}`` over the Lagrange basis.
    """

    def __init__(self, start: float, end: float, tau: float, tweaked: bool) -> None:
        self.start, self.end, self.tweaked = start, end, tweaked
        self.h, self.k, self.tau_squared = end - start, 1 + tau**2, tau**2

    def carried(self, x: Tensor) -> Tensor:
        """Return the part of the state."""
        return math.exp(-self.k * self.h) * x

    @property
    def noise_std(self) -> float:
        """Standard deviation of the added noise."""
        return math.exp(-self.end) * math.sqrt(-math.expm1(-2 * self.tau_squared * self.h))

    def combined(self, nodes: Sequence[float], values: Sequence[Tensor]) -> Tensor:
        """Return the sum over nodes, newest first."""
        points, weights = gauss_legendre()
        points = self.h / 2 * points + (self.end + self.start) / 2
        measure = self.k * self.h / 2 * weights * np.exp(self.k * (points - self.end))
        w = lagrange_integrals(np.array(nodes), points, measure)
        if self.tweaked and len(w) == 2:
            # As released: h^2 / 2 instead of the integral of e^{k (u - h)} u.
            k, h = self.k, self.h
            exact = (k * h - 1 + math.exp(-k * h)) / k**2
            change = k * (h * h / 2 - exact) / (nodes[0] - nodes[1])
            w = [w[0] + change, w[1] - change]
        return torch.stack([c * v for c, v in zip(w, values, strict=True)]).sum(0)


def sa_solver(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    tau: Stochasticity = middle_tau,
    few_steps: bool = True,
) -> Tensor:
    """Solve the SDE between PF-ODE and reverse diffusion by SA-Solver, NFE = steps.

    Xue et al. 2023 (arXiv:2309.05019), in the order predict, evaluate, correct; both
    use the same noise. Orders are the numbers of nodes, 1 to 4 (0: no corrector); they rise in the
    first steps and fall in the last. With ``few_steps``, as released for few steps, the last step
    adds no noise and has no corrector, and order 2 has other weights. Without, every step is
    corrected and the denoised images are returned: NFE = steps + 2. A step to 0 is first-order.
    """
    check_order("sa_solver", "predictor order", predictor_order, 1, 4)
    check_order("sa_solver", "corrector order", corrector_order, 0, 4)
    lambdas, count = (-sigmas.log()).tolist(), len(sigmas) - 1
    values = [denoise(x, batch_sigma(sigmas[0], x), labels)]
    for i in range(1, count + 1):
        last = i == count and few_steps
        if i == count and ends_at_zero(sigmas):
            return ddim_step(x, values[0], sigmas[i - 1], sigmas[i])
        rising = i < max(predictor_order, corrector_order - 1)
        now = min(predictor_order, i if rising else count - i + 1)
        after = min(corrector_order, i + 1 if rising else count - i + 2)
        step = _Step(
            lambdas[i - 1], lambdas[i], 0.0 if last else tau(float(sigmas[i])), tweaked=few_steps
        )
        base = step.carried(x)
        if step.noise_std > 0:
            base = base + step.noise_std * required_noise("sa_solver", noise_sampler, i - 1)
        older = lambdas[i - 1 :: -1]
        x = base + step.combined(older[:now], values[:now])
        if last:
            return x
        fresh = denoise(x, batch_sigma(sigmas[i], x), labels)
        values = [fresh, *values[:3]]
        if after:
            x = base + step.combined([lambdas[i], *older[: after - 1]], values[:after])
    return denoise(x, batch_sigma(sigmas[-1], x), labels)
