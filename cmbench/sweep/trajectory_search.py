"""Noise levels chosen by the bends of a diffusion model's trajectories (GITS), without a metric."""

from __future__ import annotations

import torch

from cmbench.diffusion.grids import sampling_karras_sigmas
from cmbench.diffusion.solvers import float64_denoiser
from cmbench.diffusion.trajectory_grids import cheapest_path, euler_step_costs
from cmbench.errors import Declined, UserError
from cmbench.sampling.draws import ImageDraws
from cmbench.sampling.search import Levels
from cmbench.sampling.stream import Sampler

#: As in the paper (Chen et al. 2024, arXiv:2405.11326, Sec. 4): steps of the fine grid, and images.
FINE_STEPS, IMAGES = 60, 256


@torch.no_grad()
def trajectory_levels(sampler: Sampler, count: int, sigma_min: float) -> Levels:
    """Return ``count`` levels from which Euler steps down to ``sigma_min`` bend least.

    Args:
        sampler: with the weights and the held-out seed; its network evaluations are
            ``FINE_STEPS`` for each of ``IMAGES`` images.
        count: noise levels to choose; the first is the plan's.
        sigma_min: end of the trajectories, which is no level.

    Raises:
        UserError: the method has no diffusion model, or there are too many levels.
    """
    method = sampler.method
    who = "cmbench tune-times --search trajectories"
    try:
        model = method.diffusion_model(sampler.nets)
    except Declined as reason:
        raise UserError(
            who, str(reason), remedy="leave --search out, or choose a diffusion model"
        ) from None
    if count > FINE_STEPS:
        raise UserError(
            who,
            f"{count} noise levels",
            allowed=f"up to {FINE_STEPS}, the points of its grid",
            remedy="choose a smaller --nfe",
        )
    shape = (IMAGES, *method.data.data_shape)
    empty = torch.empty(shape, device=sampler.device)
    noise = ImageDraws(sampler.seed, range(IMAGES)).normal("noise", empty)
    labels = sampler.labels(0, IMAGES) if method.data.num_classes else None
    labels = labels.to(sampler.device) if labels is not None else None
    denoise = float64_denoiser(model, noise.dtype)
    grid = sampling_karras_sigmas(FINE_STEPS, sigma_min, sampler.plan.sigmas[0])
    cost, _ = euler_step_costs(denoise, noise.double() * grid[0], grid, labels)
    return tuple(float(grid[i]) for i in cheapest_path(cost, count)[:-1])
