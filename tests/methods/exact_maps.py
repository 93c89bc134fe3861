"""Networks whose consistency function is exact on the mixture of :mod:`cmbench.testing.exact`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.preconditioning import boundary_scalings
from cmbench.testing.exact import SD, quantile_map


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
