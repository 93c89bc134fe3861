"""EDM: the diffusion model that consistency models start from, and the multistep baseline.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364. No teacher. One graded network call a training step (3 forward equivalents).

``parameterization = "trigflow"`` trains the same model in the frame of Lu & Song 2024
(arXiv:2410.11081, Sec. 3), ``||sd F(x_t / sd, t) - v_t||^2`` with ``c_noise = t``: the teacher that
sCM needs. With sigma_data fixed, the two are the same diffusion model in other coordinates.

Samplers: ``heun`` (order 2, any NFE, see :func:`cmbench.diffusion.solvers.heun_nfe`), ``euler``
(= DDIM, NFE = steps), and the others of ``SOLVERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims, sigma_to_t
from cmbench.diffusion.grids import lognormal_sigmas, sampling_sigmas
from cmbench.diffusion.models import DiffusionModel, EDMModel, TrigFlowModel
from cmbench.diffusion.predictions import DataAndNoiseModel, DataModel
from cmbench.diffusion.solvers import euler, heun, heun_nfe
from cmbench.diffusion.tangent import trigflow_interpolate, trigflow_velocity_target
from cmbench.diffusion.weightings import edm_weight
from cmbench.errors import Declined
from cmbench.plugin.config import MethodConfig, Positive
from cmbench.plugin.method import Batch, Draws, Kit, Method, Nets, Progress, SamplingPlan


#: What a network's raw output means, by name of the parameterization.
MODELS: dict[str, Callable[[Any, float], DiffusionModel]] = {
    "edm": EDMModel, "trigflow": TrigFlowModel, "x": DataModel, "both": DataAndNoiseModel,
}


def network_for(parameterization: str, kit: Kit) -> nn.Module:
    """Build the recipe's network; "both" needs twice the channels."""
    return kit.network(channel_copies=2) if parameterization == "both" else kit.network()


class EDMConfig(MethodConfig):
    """Hyper-parameters of EDM (Table 1 of the paper)."""

    parameterization: Literal["edm", "trigflow", "x", "both"] = Field(
        "edm",
        description="what the network predicts: EDM's F, TrigFlow's F (v-prediction on data of unit "
        "variance), the data, or data and noise",
    )
    p_mean: float = Field(-1.2, description="mean of ln sigma in training")
    p_std: Positive = Field(1.2, description="standard deviation of ln sigma in training")
    sampler: Literal["heun", "euler"] = Field("heun", description="solver of the PF-ODE")
    sigma_min: Positive = Field(0.002, description="last noise level before zero")
    sigma_max: Positive = Field(80.0, description="noise level that sampling starts from")
    rho: Positive = Field(7.0, description="exponent of the sampling grid (Eq. 5)")


class EDM(Method):
    """Diffusion training, and sampling by solving the PF-ODE."""

    Config = EDMConfig
    config: EDMConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """One network from random weights."""
        return {"model": network_for(self.config.parameterization, kit)}

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """Weighted denoising error, summed over values (Eq. 8 with the weight of Table 1)."""
        x = batch.images
        eps = draws.normal("noise", x)
        n = draws.normal("sigma", x[:, 0, 0, 0])
        sigma = lognormal_sigmas(n, self.config.p_mean, self.config.p_std)
        if self.config.parameterization == "trigflow":
            return self._trigflow_loss(nets, batch, sigma, eps)
        x_sigma = x + append_dims(sigma, x) * eps
        denoised = self.diffusion_model(nets).denoise(x_sigma, sigma, batch.labels)
        error = (denoised - x).square().flatten(1).sum(1)
        return edm_weight(sigma, self.sigma_data) * error

    def _trigflow_loss(self, nets: Nets, batch: Batch, sigma: Tensor, eps: Tensor) -> Tensor:
        """``||sd F - v_t||^2 / sd^2``: the same weighting of noise levels as EDM's."""
        t, z = sigma_to_t(sigma, self.sigma_data), self.sigma_data * eps
        x_t = trigflow_interpolate(batch.images, z, t)
        v_t = trigflow_velocity_target(batch.images, z, t)
        velocity = TrigFlowModel(nets["model"], self.sigma_data).velocity(x_t, t, batch.labels)
        return ((velocity - v_t) / self.sigma_data).square().flatten(1).sum(1)

    def diffusion_model(self, nets: Nets) -> DiffusionModel:
        """Return the denoiser in either frame."""
        return MODELS[self.config.parameterization](nets["model"], self.sigma_data)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """Heun or Euler on the Karras grid; any NFE from 1."""
        c, sampler = self.config, sampler or self.config.sampler
        if sampler not in ("heun", "euler"):
            raise Declined(f"sampler {sampler!r} is not one of heun, euler")
        if sigmas is None:
            steps = heun_nfe(nfe).n_steps if sampler == "heun" else nfe
            grid = sampling_sigmas(steps, c.sigma_min, c.sigma_max, c.rho)
            sigmas = tuple(float(s) for s in grid[:-1])
        steps = heun_nfe(nfe).n_steps if sampler == "heun" else nfe
        if len(sigmas) != steps:
            raise Declined(f"{sampler} at NFE {nfe} takes {steps} noise levels, got {len(sigmas)}")
        return SamplingPlan(nfe, sampler, tuple(sigmas))

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Solve the PF-ODE from ``sigma_max`` to zero; the solver's state is float64 as EDM's."""
        model = self.diffusion_model(nets)

        def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return model.denoise(x.float(), sigma.float(), labels).double()

        grid = torch.tensor([*plan.sigmas, 0.0], dtype=torch.float64, device=noise.device)
        x = noise.double() * grid[0]
        if plan.sampler == "euler":
            return euler(denoise, x, grid, labels=labels).float()
        lead = heun_nfe(plan.nfe).leading_euler_steps
        return heun(denoise, x, grid, labels=labels, leading_euler_steps=lead).float()
