"""PID: physics-informed distillation.

Tee et al. 2024, arXiv:2411.08378, and its official code. The network is a whole trajectory: from
noise ``z`` of level T it gives the state at any level ``t``, ``x(z, t) = (t/T) z + (1 - t/T) F(z /
sqrt(T^2 + sd^2), ln(t) / 4)``. It is trained to solve the PF-ODE, ``x - t dx/dt = D(x, t)``, with
the derivative as a difference of two outputs and the teacher's D behind a stop-gradient; gradients
flow through both outputs. No data are used: a batch's images give the shape and its labels only.

F starts from the teacher's raw network. Forward equivalents per training step: 7 (teacher 1,
student 2 x 3). Samples are ``x(z, sigma_min)``: one evaluation, no more. Published FIDs: CIFAR-10
3.92 (UNVERIFIED), ImageNet-64 9.49.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import choose_uniformly, karras_sigmas
from cmbench.diffusion.models import TrajectoryModel
from cmbench.plugin.config import Positive
from cmbench.plugin.method import Batch, Draws, Kit, Nets, Progress, SamplingPlan
from cmbench.training.randomness import RandomState, replayed
from cmbench.training.resident import resident
from cmbench_plugins._distances import MetricConfig, MetricMethod
from cmbench_plugins._jumps import one_step_plan
from cmbench_plugins.edm import initial_network

__all__ = ["PID", "PIDConfig"]


class PIDConfig(MetricConfig):
    """Hyper-parameters of PID."""

    metric: Literal["l2", "l1", "pseudo-huber", "lpips"] = Field(
        "lpips", description="distance of the two sides of the ODE"
    )
    n_points: int = Field(250, ge=2, description="N: number of noise levels")
    sigma_min: Positive = Field(0.002, description="level at which the trajectory is sampled")
    sigma_max: Positive = Field(80.0, description="T: level of the noise")
    rho: Positive = Field(7.0, description="exponent of the noise-level grid")
    clip_samples: bool = Field(
        True, description="clamp samples to [-1, 1], where the data lie there"
    )


class PID(MetricMethod):
    """Physics-informed distillation."""

    Config = PIDConfig
    config: PIDConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The trajectory's network, from the teacher's weights."""
        return {"model": initial_network(kit, "edm", self.config)}

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``d(x - t dx/dt, sg D(x, t))`` at the points of the trajectory through ``z``."""
        images, labels = batch.images, batch.labels
        z = self.config.sigma_max * draws.normal("noise", images)
        t, other = self.times(draws.uniform("index", images[:, 0, 0, 0]))
        trajectory, randomness = self.trajectory(nets["model"]), RandomState.of(z.device)
        x = trajectory(z, t, labels)
        with replayed(randomness):
            x_other = trajectory(z, other, labels)
        # t dx/dt: the quotient of the times first, so that small ones do not lose digits.
        slope = append_dims(t / (t - other), x) * (x - x_other)
        with torch.no_grad():
            denoised = self.distilled().denoise(x, t, labels)
        return self.distance(x - slope, denoised)

    def times(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A level of the grid and the next smaller one; for the smallest the next larger."""
        c = self.config
        grid = resident(
            karras_sigmas,
            c.n_points,
            c.sigma_min,
            c.sigma_max,
            c.rho,
            like=uniform,
            dtype=uniform.dtype,
        )
        i = choose_uniformly(c.n_points, uniform)
        return grid[i], grid[torch.where(i > 0, i - 1, 1)]

    def trajectory(self, network: Any) -> TrajectoryModel:
        """``x(z, t)`` around a network."""
        return TrajectoryModel(network, self.sigma_data, self.config.sigma_max)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """One evaluation."""
        return one_step_plan(
            "physics-informed distillation", self.config.sigma_max, nfe, sigmas, sampler
        )

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """``x(T noise, sigma_min)``."""
        t = torch.full_like(noise[:, 0, 0, 0], self.config.sigma_min)
        x = self.trajectory(nets["model"])(self.config.sigma_max * noise, t, labels)
        return x.clamp(-1, 1) if self.config.clip_samples and self.data.bounded else x
