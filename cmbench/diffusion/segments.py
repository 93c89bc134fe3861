"""Jumps to the end of a segment of a noise-level grid: what TRACT and multistep models regress on.

A grid is cut into segments; inside each the student jumps from any level to the segment's end. EDM
frame; levels ``[N]`` with ``sigma > sigma_next >= 0``, images ``[N, C, H, W]``.

A teacher's step is stated by the denoised images with which one DDIM step makes it. Its end is
:func:`cmbench.diffusion.solvers.ddim_step`, and the student's target, the inverse of the one jump
that ends where teacher and student end, is :func:`cmbench.diffusion.solvers.two_step_target`. So
noisy images never cancel, which at sigma 80 would cost four digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims, tiny
from cmbench.diffusion.grids import RHO, SIGMA_MAX, SIGMA_MIN, karras_sigmas
from cmbench.diffusion.solvers import Denoiser, ddim_step


def heun_denoised(
    denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Return the images ``D + sigma / (2 s) (D_s - D)`` of a Heun step, two evaluations.

    ``D_s`` is the prediction where an Euler step to ``s`` ends: the same point as
    :func:`cmbench.diffusion.solvers.heun_step`. Where ``s`` is 0 the step is Euler's, ``D``.
    """
    first = denoise(x, sigma, labels)
    level = torch.where(sigma_next > 0, sigma_next, sigma)  # any level: its result is not used
    second = denoise(ddim_step(x, first, sigma, level), level, labels)
    half = torch.where(sigma_next > 0, sigma / (2 * level), torch.zeros_like(sigma))
    return first + append_dims(half, x) * (second - first)


def addim_denoised(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, variance: Tensor
) -> Tensor:
    """Return the images of aDDIM's step: DDIM with the variance that the mean ``D`` lacks.

    The step ends at ``D + sqrt(s^2 + q) e`` with ``e = (x - D) / sigma``, ``q = (1 - s/sigma)^2 v
    d / ||e||^2`` for d values per image, and ``v`` the variance of the clean image per value,
    ``[N]`` (Heek et al. 2024, arXiv:2403.06807, App. A, divided by alpha_s). ``v = 0`` is DDIM.
    """
    e = (x - denoised) / append_dims(sigma, x)
    added = variance / e.square().flatten(1).mean(1).clamp_min(tiny(sigma))
    gap = 1 - sigma_next / sigma
    longer = gap * added / (torch.sqrt(sigma_next**2 + gap**2 * added) + sigma_next)
    # Nothing added to a step to zero is 0 / 0.
    return denoised + append_dims(torch.where(added > 0, longer, torch.zeros_like(gap)), x) * e


# --- multistep distillation in EDM's frame -------------------------------------------------------


def refined_sigmas(
    n_edges: int,
    own_intervals: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:
    """Return a teacher's ascending levels, 0 first, with at least ``n_edges`` edges.

    A Karras grid without the levels that are inner ones of the student's Karras grid of
    ``own_intervals`` intervals between the same ends (EpiGenomicsCode/edm). 0 if the student's ends
    are others: then none is left out.
    """
    points = n_edges
    while True:
        gaps = max(points - 1, 1)
        kept = [
            i
            for i in range(points)
            if i in (0, gaps) or not own_intervals or i * own_intervals % gaps
        ]
        if len(kept) >= n_edges:
            break
        points += 1
    levels = karras_sigmas(points, sigma_min, sigma_max, rho)[torch.tensor(kept)]
    return torch.cat([levels.new_zeros(1), levels])


def edge_probabilities(sigmas: Tensor, p_mean: float, p_std: float, rho: float = RHO) -> Tensor:
    """Return the probability of each edge of ascending levels with 0 first, ``[len - 1]``.

    EDM's lognormal density seen on a Karras grid, ``sigma^(-1/rho) exp(-((ln sigma - P_mean) /
    P_std)^2 / 2)`` of an edge's upper level; the edge to 0 has one in the number of edges
    (EpiGenomicsCode/edm).
    """
    upper, count = sigmas[2:], len(sigmas) - 1
    log_weight = -upper.log() / rho - ((upper.log() - p_mean) / p_std) ** 2 / 2
    last = 1 / count
    return torch.cat([upper.new_tensor([last]), (1 - last) * torch.softmax(log_weight, 0)])
