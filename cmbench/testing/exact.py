"""A mixture on the line whose consistency function is known exactly.

In one dimension the PF-ODE moves quantiles to quantiles: ``f(x, sigma)`` is where the distribution
function at ``sigma_end`` takes the value that the one at ``sigma`` has at ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.models import MixtureModel

#: The sigma_data of the models.
SD = 0.5
MEANS, STDS, WEIGHTS = (-0.9, 0.1, 0.7), (0.15, 0.3, 0.1), (0.3, 0.45, 0.25)


def line_mixture() -> GaussianMixture:
    """Return three modes of unlike weight and width; mean not zero, spread not sigma_data."""
    return GaussianMixture(
        torch.tensor(MEANS, dtype=torch.float64).reshape(3, 1, 1, 1),
        torch.tensor(STDS, dtype=torch.float64),
        torch.tensor(WEIGHTS, dtype=torch.float64),
    )


def exact_model() -> MixtureModel:
    """Return the exact teacher."""
    return MixtureModel(line_mixture(), SD)


def _parameters() -> tuple[Tensor, Tensor, Tensor]:
    means, stds, weights = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS, WEIGHTS))
    return means, stds, weights


def _tails(x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the masses below and above ``x`` ``[N]``, each accurate where it is small."""
    means, stds, weights = _parameters()
    level = sigma[:, None] if isinstance(sigma, Tensor) else sigma
    z = (x[:, None] - means) / torch.sqrt(stds**2 + level**2)
    ndtr = torch.special.ndtr
    return (weights * ndtr(z)).sum(1), (weights * ndtr(-z)).sum(1)


def _density(x: Tensor, sigma: Tensor | float) -> Tensor:
    means, stds, weights = _parameters()
    level = sigma[:, None] if isinstance(sigma, Tensor) else sigma
    spread = torch.sqrt(stds**2 + level**2)
    normal = torch.exp(-(((x[:, None] - means) / spread) ** 2) / 2) / spread
    density: Tensor = (weights * normal).sum(1) / (2 * torch.pi) ** 0.5
    return density


def quantile_map(x: Tensor, sigma: Tensor, sigma_end: float) -> Tensor:
    """Return the exact flow map ``[N]`` to ``sigma_end``, differentiable once in both modes."""
    below, above = _tails(x, sigma)
    with torch.no_grad():
        low, high = torch.full_like(below, -8.0), torch.full_like(below, 8.0)
        lower_half = below < above
        for _ in range(60):
            middle = (low + high) / 2
            here = _tails(middle, sigma_end)
            too_low = torch.where(lower_half, here[0] < below, here[1] > above)
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        root = ((low + high) / 2).detach()
    # One Newton step from the root moves nothing and carries the derivative.
    here = _tails(root, sigma_end)
    missing = torch.where(lower_half, below - here[0], here[1] - above)
    return root + missing / _density(root, sigma_end)
