"""Rectified flow: a velocity field whose straight paths lead from noise to data.

Liu et al. 2022, "Flow Straight and Fast", arXiv:2209.03003, Eq. 1. No teacher. One graded network
call per training step. Sampled by Euler steps, one network call each.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.plugin.config import MethodConfig, Positive
from cmbench.plugin.method import Batch, Draws, Method, Nets, Progress, SamplingPlan


class FlowConfig(MethodConfig):
    """Hyper-parameters; each has a description, and recipes are validated by this class."""

    sigma_max: Positive = Field(80.0, description="noise level that sampling starts from")


class Flow(Method):
    """``x_s = (1 - s) x0 + s eps``, and a network that predicts ``eps - x0`` from ``x_s``."""

    Config = FlowConfig
    config: FlowConfig
    sampler = "euler"

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """Squared error of the predicted velocity, one value per image (Eq. 1)."""
        x0 = batch.images
        # Pairs, as those of example-reflow, have their own noise.
        eps = draws.normal("noise", x0) if batch.noise is None else batch.noise
        s = draws.uniform("time", x0[:, 0, 0, 0])
        x_s = x0 + append_dims(s, x0) * (eps - x0)
        error = nets["model"](x_s, s, batch.labels) - (eps - x0)
        return error.square().flatten(1).sum(1)

    def sampling_levels(self, nfe: int) -> list[float]:
        """Equal steps in flow time ``s``, which is the noise level ``s / (1 - s)``."""
        start = self.config.sigma_max / (1 + self.config.sigma_max)
        times = [start * (nfe - i) / nfe for i in range(nfe)]
        return [s / (1 - s) for s in times]

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Follow the velocity from noise to data."""
        sigmas = torch.tensor([*plan.sigmas, 0.0], device=noise.device)
        times = sigmas / (1 + sigmas)
        x = times[0] * noise
        for s, s_next in pairwise(times):
            x = x + (s_next - s) * nets["model"](x, s.expand(len(x)), labels)
        return x
