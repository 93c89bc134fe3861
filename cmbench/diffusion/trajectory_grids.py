"""Noise levels chosen by how a model's trajectories bend: GITS.

Chen et al. 2024 (arXiv:2405.11326), Sec. 4: among the points of a fine grid, those whose Euler
steps leave the trajectories least, found by dynamic programming. Such levels belong to one model
and its data: they are tuned, not a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmbench.diffusion.solvers import Denoiser, batch_sigma, ddim_step
from cmbench.errors import UserError


def _chord_distances(points: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the distance ``[N]`` of ``points`` from the line through ``start`` and ``end``."""
    chord, way = (end - start).flatten(1), (points - start).flatten(1)
    along: Tensor = chord / chord.norm(dim=1, keepdim=True)
    across: Tensor = way - (way * along).sum(1, keepdim=True) * along
    return across.square().sum(1).sqrt()


def euler_step_costs(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what every Euler step between two points of a grid costs, and the deviations.

    Args:
        denoise: see :mod:`cmbench.diffusion.solvers`; called once per step of the grid.
        x: noise ``[N, C, H, W]`` at ``sigmas[0]``.
        sigmas: descending ``[n + 1]``, ending above 0.
        labels: int64 ``[N]`` or None.

    Returns:
        ``cost [n + 1, n + 1]``: entry (i, j), j > i, is how far an Euler step from point i to j
        lies from the chord of its trajectory, compared with point j itself, mean over images; 0
        elsewhere. ``deviation [n + 1]``: the mean distance of each point from the chord.

    """
    points, predictions = [x], []
    for sigma, sigma_next in pairwise(sigmas.unbind()):
        predictions.append(denoise(points[-1], batch_sigma(sigma, x), labels))
        points.append(ddim_step(points[-1], predictions[-1], sigma, sigma_next))
    own = torch.stack([_chord_distances(p, x, points[-1]) for p in points])
    cost = torch.zeros((len(points), len(points)), dtype=torch.float64)
    for i, denoised in enumerate(predictions):
        for j in range(i + 1, len(points)):
            landed = ddim_step(points[i], denoised, sigmas[i], sigmas[j])
            apart = _chord_distances(landed, x, points[-1]) - own[j]
            cost[i, j] = apart.abs().mean()
    return cost, own.mean(1)


def cheapest_path(cost: Tensor, steps: int, coefficient: float = 1.15) -> list[int]:
    """Return the points of the path from first to last in ``steps`` steps that costs least.

    ``V_k(j) = min over i > j of cost(j, i) + coefficient V_{k-1}(i)``: with a coefficient above 1,
    the paper's 1.15, a step counts more the more steps come before it.
    """
    last = len(cost) - 1
    if not 1 <= steps <= last:
        raise UserError(
            "cheapest_path",
            f"{steps} steps on a grid of {last}",
            allowed=f"1 to {last}",
            remedy="choose fewer steps or a finer grid",
        )
    values, choices = cost[:, last].clone(), list[Sequence[int]]()
    values[last] = torch.inf
    for _ in range(steps - 1):
        total = cost + coefficient * values
        total = torch.where(torch.ones_like(cost).triu(1).bool(), total, torch.inf)
        values, chosen = total.min(1)
        choices.insert(0, chosen.tolist())
    path = [0]
    for chosen_from in choices:
        path.append(int(chosen_from[path[-1]]))
    return [*path, last]
