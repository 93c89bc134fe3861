"""Diffusion models whose raw network predicts the data, or data and noise together.

Both read a VP-trained network (Salimans & Ho 2022, arXiv:2202.00512, Sec. 4): the network sees the
variance-preserving ``z = (x + sigma eps) / sqrt(1 + sigma^2)``. Velocity prediction is
:class:`cmbench.diffusion.models.TrigFlowModel`. ``c_noise`` is EDM's ``ln(sigma) / 4``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims, denoised_to_velocity, edm_to_vp, tiny, trig_to_edm
from cmbench.diffusion.preconditioning import RawNetwork


def _c_noise(sigma: Tensor) -> Tensor:
    return torch.log(sigma.clamp_min(tiny(sigma))) / 4


@dataclass(frozen=True)
class DataModel:
    """The raw network is the denoiser: ``D = F(z)`` ("x-prediction")."""

    network: RawNetwork
    sigma_data: float
    parameterization: ClassVar[str] = "x"

    def denoise(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``F(z, ln(sigma) / 4)``, clean images ``[N, C, H, W]``; ``sigma [N]``."""
        z, _, _ = edm_to_vp(x_sigma, sigma)
        return self.network(z, _c_noise(sigma), labels)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``(cos t x_t - D) / sin t`` ``[N, C, H, W]``; ``t [N]`` > 0."""
        x_sigma, sigma = trig_to_edm(x_t, t, self.sigma_data)
        return denoised_to_velocity(x_t, t, self.denoise(x_sigma, sigma, labels))


@dataclass(frozen=True)
class DataAndNoiseModel:
    """The raw network returns ``x`` and ``eps`` in ``2 C`` channels, mixed by the noise variance.

    ``D = beta^2 x + alpha^2 (z - beta eps) / alpha`` with ``alpha^2 + beta^2 = 1``: the data part
    counts where noise is high, the noise part where it is low (Salimans & Ho 2022, Sec. 4, "both").
    The network must map ``2 C`` to ``2 C`` channels; it sees ``z`` twice.
    """

    network: RawNetwork
    sigma_data: float
    parameterization: ClassVar[str] = "both"

    def denoise(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mixture of the two estimates, clean images ``[N, C, H, W]``; ``sigma [N]``."""
        z, alpha, beta = edm_to_vp(x_sigma, sigma)
        x, epsilon = self.network(torch.cat([z, z], 1), _c_noise(sigma), labels).chunk(2, 1)
        a, b = append_dims(alpha, z), append_dims(beta, z)
        return b**2 * x + a * (z - b * epsilon)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``(cos t x_t - D) / sin t`` ``[N, C, H, W]``; ``t [N]`` > 0."""
        x_sigma, sigma = trig_to_edm(x_t, t, self.sigma_data)
        return denoised_to_velocity(x_t, t, self.denoise(x_sigma, sigma, labels))
