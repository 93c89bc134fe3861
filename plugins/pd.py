"""PD: progressive distillation.

Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models",
arXiv:2202.00512, Algorithm 2. In every stage a student learns to do in one DDIM step what its
teacher does in two, then becomes the teacher. A stage is a phase of training: optimizer, schedule
and averages start anew, and its weights are exported, so that one training gives a generator for
each step count. 5 forward equivalents per training step (student 3, teacher 2).

Grids: ``cosine``, the paper's schedule on ``logsnr`` in [-20, 20], which ends at the data;
``karras``, the port to EDM's frame in openai/consistency_models_cifar10, which ends at
``sigma_min`` without a last denoising. The loss is the *mean* over values, as in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.distances import l2_mean
from cmbench.diffusion.frames import append_dims, cosine_time_to_sigma
from cmbench.diffusion.grids import choose_uniformly, halving_stages, karras_sigmas
from cmbench.diffusion.models import DiffusionModel
from cmbench.diffusion.solvers import ddim_step, two_step_target
from cmbench.diffusion.weightings import snr_plus_one_weight, truncated_snr_weight
from cmbench.errors import UserError
from cmbench.plugin.config import EMAConfig, MethodConfig, OptimizerConfig, Positive
from cmbench.plugin.method import (
    Batch,
    Draws,
    Kit,
    Method,
    Nets,
    Objective,
    Phase,
    Progress,
    SamplingPlan,
)
from cmbench.training.resident import resident
from cmbench_plugins._jumps import jumps_plan, sample_by_jumps
from cmbench_plugins.edm import MODELS, channel_copies, initial_network

__all__ = ["PD", "PDConfig"]


class PDConfig(MethodConfig):
    """Hyper-parameters of PD; ``duration_kimg`` is a stage's."""

    parameterization: Literal["edm", "trigflow", "x", "both"] = Field(
        "trigflow", description="as the teacher's; trigflow is v-prediction (App. D)"
    )
    start_steps: int = Field(
        64, ge=2, description="steps of the first teacher; the first student has half of them"
    )
    end_steps: int = Field(1, ge=1, description="steps of the last student")
    last_stages_factor: Positive = Field(
        1.0, description="length of the stages of 2 and 1 steps, relative to the others"
    )
    grid: Literal["karras", "cosine"] = Field("karras", description="noise levels of the steps")
    sigma_min: Positive = Field(0.002, description="lowest noise level of the karras grid")
    sigma_max: Positive = Field(80.0, description="highest noise level of the karras grid")
    rho: Positive = Field(7.0, description="exponent of the karras grid")
    weighting: Literal["truncated-snr", "snr+1"] = Field(
        "truncated-snr", description="max(SNR, 1), or SNR + 1 (= v-prediction's)"
    )
    clip_samples: bool = Field(
        True,
        description="clamp every denoised image to [-1, 1] in sampling (cosine grid), where "
        "the data lie there",
    )
    ema: tuple[EMAConfig, ...] = Field((), description="the paper samples the weights themselves")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(lr=5e-5, decay="linear", grad_clip=1.0),
        description="optimizer of every stage; its schedule spans one stage",
    )


class PD(Method):
    """Algorithm 2."""

    Config = PDConfig
    config: PDConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """Student and teacher, both the given diffusion model at first."""
        self.first_teacher = kit.teacher
        return {
            "model": initial_network(kit, self.config.parameterization, self.config),
            "teacher": kit.network(channel_copies=channel_copies(self.config.parameterization)),
        }

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """One phase a halving; each exports the generator of its step count."""
        phases = []
        for steps in halving_stages(self.config.start_steps, self.config.end_steps):
            factor = self.config.last_stages_factor if steps <= 2 else 1.0
            loss = self._stage_loss(steps)
            objective = Objective(loss, ("model",), self.config.optimizer)
            name = f"steps-{steps}"
            images = round(self.config.duration_kimg * 1000 * factor)
            phases.append(
                Phase(name, images, (objective,), self.config.ema, start=self.promote, export=name)
            )
        return phases

    def promote(self, nets: Nets) -> None:
        """The student becomes the teacher (Algorithm 2, last lines of a stage)."""
        if self.first_teacher is None:
            raise UserError(
                "method PD",
                "has no teacher to start from",
                allowed="METHOD:RECIPE or analytic",
                remedy="set teacher in the recipe",
            )
        nets["teacher"].load_state_dict(nets["model"].state_dict())

    def teacher_model(self, steps: int, nets: Nets) -> DiffusionModel:
        """The model that a stage distils: an exact one without a network teaches the first only."""
        first = self.first_teacher
        if first is not None and first.network is None and 2 * steps == self.config.start_steps:
            return first.model
        return self.model(nets["teacher"])

    def _stage_loss(self, steps: int) -> Any:
        def loss(nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
            return self.stage_loss(steps, nets, batch, draws)

        return loss

    def stage_loss(self, steps: int, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """``w(sigma) ||x_student - x_target||^2`` (Algorithm 2, the student's N = ``steps``)."""
        x0 = batch.images
        grid = resident(self.grid, 2 * steps, like=x0, dtype=x0.dtype)
        i = 1 + choose_uniformly(steps, draws.uniform("index", x0[:, 0, 0, 0]))
        sigma, middle, end = grid[2 * i], grid[2 * i - 1], grid[2 * i - 2]
        x = x0 + append_dims(sigma, x0) * draws.normal("noise", x0)
        with torch.no_grad():
            teacher = self.teacher_model(steps, nets)
            first = teacher.denoise(x, sigma, batch.labels)
            x_middle = ddim_step(x, first, sigma, middle)
            second = teacher.denoise(x_middle, middle, batch.labels)
            target = two_step_target(first, second, sigma, middle, end)
        denoised = self.model(nets["model"]).denoise(x, sigma, batch.labels)
        return self.weight(sigma) * l2_mean(denoised, target)

    def weight(self, sigma: Tensor) -> Tensor:
        """``w`` as a weight of the squared error of ``x`` (Eq. 9 and 10)."""
        if self.config.weighting == "snr+1":
            return snr_plus_one_weight(sigma)
        return truncated_snr_weight(sigma)

    def model(self, network: nn.Module) -> DiffusionModel:
        """Return a network as a diffusion model."""
        return MODELS[self.config.parameterization](network, self.sigma_data)

    def grid(self, steps: int) -> Tensor:
        """Ascending noise levels ``[steps + 1]``; a grid of 2 N steps contains that of N.

        The cosine grid ends at zero: as released, its last step returns the prediction itself.
        """
        if self.config.grid == "cosine":
            u = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            return torch.cat([u.new_zeros(1), cosine_time_to_sigma(u)])
        c = self.config
        return karras_sigmas(steps + 1, c.sigma_min, c.sigma_max, c.rho)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """DDIM with the student trained for exactly ``nfe`` steps."""
        stages = halving_stages(self.config.start_steps, self.config.end_steps)
        who = f"progressive distillation from {self.config.start_steps} steps"
        return jumps_plan(who, stages, self.grid, nfe, sigmas, sampler)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """DDIM from ``sigma_max`` down to the grid's end."""
        cosine = self.config.grid == "cosine"
        clip = cosine and self.config.clip_samples and self.data.bounded
        levels = (*plan.sigmas, 0.0 if cosine else self.config.sigma_min)
        return sample_by_jumps(self.model(nets["model"]), noise, levels, labels, clip=clip)
