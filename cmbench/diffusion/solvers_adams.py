"""Adams solvers of the PF-ODE: past slopes are extrapolated, one evaluation per step.

Signatures and notation as in :mod:`cmbench.diffusion.solvers`. The solvers differ in the variable
in which a polynomial passes through the past: ``sigma`` (Adams-Bashforth), VP time (DEIS), or the
step number (iPNDM, whose weights ignore that steps differ). A step to 0 is a first-order step, and
one step is always DDIM.

``analytic_first_step`` takes :func:`cmbench.diffusion.solvers.analytic_denoised` for the network in
the first step, so that n steps cost n - 1 evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cmbench.diffusion.frames import sigma_to_vp_time
from cmbench.diffusion.solvers import (
    Denoiser,
    NoiseSampler,
    analytic_denoised,
    batch_sigma,
    check_order,
    ddim_step,
    ends_at_zero,
)

#: ``coefficients(past sigmas, newest first, next sigma) -> C_j`` of ``x' = x + sum_j C_j e_j``.
Coefficients = Callable[[Tensor, Tensor], Sequence[float]]

#: Adams-Bashforth weights of equal steps, newest slope first, by number of slopes.
_EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@cache
def gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights: rounding even for one step over the whole range."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    return nodes, weights


def lagrange_integrals(nodes: np.ndarray, points: np.ndarray, measure: np.ndarray) -> list[float]:
    """Return ``sum_points measure l_j(points)`` of the Lagrange basis ``l_j`` through ``nodes``."""
    integrals = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)[:, None]
        basis = np.prod((points - others) / (node - others), axis=0)
        integrals.append(float(measure @ basis))
    return integrals


def _extrapolation_coefficients(
    past: Tensor, sigma_next: Tensor, time: Callable[[Tensor], Tensor]
) -> list[float]:
    """Return ``C_j``, the integrals over sigma of the Lagrange polynomials in ``time(sigma)``.

    ``past`` holds the noise levels of the slopes, newest first. The quadrature runs in
    ``ln sigma``, where the integrand is smooth.
    """
    nodes, weights = gauss_legendre()
    low, high = math.log(float(past[0])), math.log(float(sigma_next))
    points = np.exp((high - low) / 2 * nodes + (high + low) / 2)
    measure = (high - low) / 2 * weights * points  # d sigma
    tau = time(torch.from_numpy(points)).numpy()
    return lagrange_integrals(time(past.double().cpu()).numpy(), tau, measure)


def _adams(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None,
    slopes_kept: int,
    coefficients: Coefficients,
    analytic_first_step: bool,
) -> Tensor:
    """Add combinations of the newest slopes; their number rises in the first steps."""
    last, to_zero = len(sigmas) - 2, ends_at_zero(sigmas)
    slopes: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        if i == 0 and analytic_first_step:
            denoised = analytic_denoised(x, sigmas[i])
        else:
            denoised = denoise(x, batch_sigma(sigmas[i], x), labels)
        slopes = [(x - denoised) / sigmas[i], *slopes[: slopes_kept - 1]]
        if i == last and to_zero:
            return ddim_step(x, denoised, sigmas[i], sigmas[i + 1])
        past = sigmas[i - len(slopes) + 1 : i + 1].flip(0)
        for c, slope in zip(coefficients(past, sigmas[i + 1]), slopes, strict=True):
            x = x + c * slope
    return x


def deis_tab(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: int = 3,
    analytic_first_step: bool = False,
) -> Tensor:
    """Solve by tAB-DEIS: polynomial extrapolation of the noise in VP time, NFE = steps.

    Zhang & Chen 2022 (arXiv:2204.13902), Sec. 3. ``order`` is the degree of the
    polynomial (``order + 1`` past slopes), rising in the first steps; 0 is DDIM, 3 the published
    3-DEIS (other code calls that maximal order 4). ``sigmas`` are best uniform in the root of VP
    time.
    """
    check_order("deis_tab", "degree", order, 0, 3)

    def coefficients(past: Tensor, sigma_next: Tensor) -> Sequence[float]:
        return _extrapolation_coefficients(past, sigma_next, sigma_to_vp_time)

    return _adams(denoise, x, sigmas, labels, order + 1, coefficients, analytic_first_step)


def adams_bashforth(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: int = 4,
    analytic_first_step: bool = False,
) -> Tensor:
    """Solve by variable-step Adams-Bashforth in sigma: order 1 to 4, NFE = steps.

    Exact for slopes that are polynomials in sigma of degree ``order - 1``. The same code under the
    name iPNDM_v has other coefficients from order 3 on where it was released: mis-placed
    parentheses.
    """
    check_order("adams_bashforth", "order", order, 1, 4)

    def coefficients(past: Tensor, sigma_next: Tensor) -> Sequence[float]:
        return _extrapolation_coefficients(past, sigma_next, lambda sigma: sigma)

    return _adams(denoise, x, sigmas, labels, order, coefficients, analytic_first_step)


def ipndm(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: int = 4,
    analytic_first_step: bool = False,
) -> Tensor:
    """Solve by iPNDM: Adams-Bashforth weights of equal steps in sigma, NFE = steps.

    Liu et al. 2022 (arXiv:2202.09778) without its Runge-Kutta start, as Zhang & Chen 2022
    (arXiv:2204.13902) define it; here in the EDM frame. ``order`` 1 (Euler) to 4 is the
    number of slopes. Steps that differ leave a global order of 1; it is meant for few steps on the
    Karras grid.
    """
    check_order("ipndm", "order", order, 1, 4)

    def coefficients(past: Tensor, sigma_next: Tensor) -> Sequence[float]:
        gap = float(sigma_next - past[0])
        return [gap * weight for weight in _EQUAL_STEPS[len(past) - 1]]

    return _adams(denoise, x, sigmas, labels, order, coefficients, analytic_first_step)
