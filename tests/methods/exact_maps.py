"""A mixture on the line whose consistency function is known exactly, and networks that are it.

In one dimension the PF-ODE moves quantiles to quantiles: ``f(x, sigma)`` is where the distribution
function at ``sigma_end`` takes the value that the one at ``sigma`` has at ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.models import MixtureModel
from cmbench.diffusion.preconditioning import boundary_scalings

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


def _tails(x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the masses below and above ``x`` ``[N]``, each accurate where it is small."""
    means, stds, weights = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS, WEIGHTS))
    level = sigma[:, None] if isinstance(sigma, Tensor) else sigma
    z = (x[:, None] - means) / torch.sqrt(stds**2 + level**2)
    ndtr = torch.special.ndtr
    return (weights * ndtr(z)).sum(1), (weights * ndtr(-z)).sum(1)


def _density(x: Tensor, sigma: Tensor | float) -> Tensor:
    means, stds, weights = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS, WEIGHTS))
    level = sigma[:, None] if isinstance(sigma, Tensor) else sigma
    spread = torch.sqrt(stds**2 + level**2)
    normal = torch.exp(-(((x[:, None] - means) / spread) ** 2) / 2) / spread
    return (weights * normal).sum(1) / (2 * torch.pi) ** 0.5


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


class ExactConsistency(nn.Module):
    """The raw network whose consistency function is exact, plus ``delta`` times a smooth bump.

    ``frame`` "edm": boundary scalings at ``sigma_min``, c_noise = ln(sigma) / 4; "trigflow":
    c_noise = t. With ``exact_target`` the bump is there only while gradients are recorded: the
    student is off, the target is exact.
    """

    def __init__(
        self, frame: str = "edm", sigma_min: float = 0.002, *, exact_target: bool = False
    ) -> None:
        super().__init__()
        self.frame, self.sigma_min, self.exact_target = frame, sigma_min, exact_target
        self.delta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(
        self, x_in: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment: Any = None
    ) -> Tensor:
        raw = self._edm(x_in, c_noise) if self.frame == "edm" else self._trigflow(x_in, c_noise)
        if self.exact_target and not torch.is_grad_enabled():
            return raw
        return raw + self.delta * torch.sin(1.3 * x_in + append_dims(c_noise, x_in) + 0.4)

    def _edm(self, x_in: Tensor, c_noise: Tensor) -> Tensor:
        sigma = torch.exp(4 * c_noise)
        scalings = boundary_scalings(sigma, SD, self.sigma_min)
        x = x_in.flatten() / scalings.c_in
        f = quantile_map(x, sigma, self.sigma_min)
        inside = scalings.c_out > 1e-9  # at the boundary F does not matter
        c_out = torch.where(inside, scalings.c_out, torch.ones_like(sigma))
        raw = torch.where(inside, (f - scalings.c_skip * x) / c_out, torch.zeros_like(f))
        return raw.reshape(x_in.shape)

    def _trigflow(self, x_in: Tensor, t: Tensor) -> Tensor:
        x_t = x_in.flatten() * SD
        f = quantile_map(x_t / torch.cos(t), SD * torch.tan(t), 0.0)
        return ((torch.cos(t) * x_t - f) / (SD * torch.sin(t))).reshape(x_in.shape)

    def forward_with_tangent(
        self, x: Tensor, c_noise: Tensor, dx: Tensor, dc_noise: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        tangent = torch.func.jvp(self.forward, (x, c_noise), (dx, dc_noise))[1]
        return self.forward(x, c_noise), tangent.detach()
