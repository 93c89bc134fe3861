"""PD: progressive distillation.

Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models",
arXiv:2202.00512, Algorithm 2. In every stage a student learns to do in one DDIM step what its
teacher does in two, then becomes the teacher. A stage is a phase of training: optimizer, schedule
and averages start anew, and its weights are exported, so that one training gives a generator for
each step count. 5 forward equivalents a training step (student 3, teacher 2).

Grids: ``cosine``, the paper's schedule on ``logsnr`` in [-20, 20]; ``karras``, the port to EDM's
frame in openai/consistency_models_cifar10, which ends at ``sigma_min`` without a last denoising.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.distances import squared_l2_sum
from cmbench.diffusion.frames import append_dims, cosine_time_to_sigma
from cmbench.diffusion.grids import halving_stages, karras_sigmas
from cmbench.diffusion.models import DiffusionModel
from cmbench.diffusion.solvers import ddim_step, euler, inverse_ddim
from cmbench.diffusion.weightings import snr_plus_one_weight, truncated_snr_weight
from cmbench.errors import Declined, UserError
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
from cmbench_plugins.edm import MODELS

__all__ = ["PD", "PDConfig"]


class PDConfig(MethodConfig):
    """Hyper-parameters of PD; ``duration_kimg`` is a stage's."""

    parameterization: Literal["edm", "trigflow", "x", "both"] = Field(
        "trigflow", description="as the teacher's; trigflow is v-prediction (App. D)"
    )
    start_steps: int = Field(64, ge=2, description="steps of the first teacher; the first student "
                             "has half of them")
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
        copies = 2 if self.config.parameterization == "both" else 1
        self.has_teacher = kit.teacher is not None and kit.teacher.network is not None
        if kit.teacher is None:  # weights follow from a checkpoint
            network = kit.network(channel_copies=copies)
            return {"model": network, "teacher": kit.network(channel_copies=copies)}
        student = kit.student_of(kit.teacher, channel_copies=copies)
        teacher = kit.student_of(kit.teacher, channel_copies=copies)
        return {"model": student, "teacher": teacher}

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
        if not self.has_teacher:
            raise UserError("method PD", "has no teacher network to start from",
                            allowed="METHOD:RECIPE", remedy="set teacher in the recipe")
        nets["teacher"].load_state_dict(nets["model"].state_dict())

    def _stage_loss(self, steps: int) -> Any:
        def loss(nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
            return self.stage_loss(steps, nets, batch, draws)

        return loss

    def stage_loss(self, steps: int, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """``w(sigma) ||x_student - x_target||^2`` (Algorithm 2, the student's N = ``steps``)."""
        x0 = batch.images
        grid = self.grid(2 * steps).to(x0)
        i = 1 + (draws.uniform("index", x0[:, 0, 0, 0]) * steps).long().clamp_max(steps - 1)
        sigma, middle, end = grid[2 * i], grid[2 * i - 1], grid[2 * i - 2]
        x = x0 + append_dims(sigma, x0) * draws.normal("noise", x0)
        with torch.no_grad():
            teacher = self.model(nets["teacher"])
            x_middle = ddim_step(x, teacher.denoise(x, sigma, batch.labels), sigma, middle)
            last = teacher.denoise(x_middle, middle, batch.labels)
            x_end = ddim_step(x_middle, last, middle, end)
            target = inverse_ddim(x_end, x, sigma, end)
            if self.config.grid == "cosine":
                # The last interval ends at the data: its target is what the teacher predicts.
                target = torch.where(append_dims(i, x0) == 1, last, target)
        denoised = self.model(nets["model"]).denoise(x, sigma, batch.labels)
        weigh = truncated_snr_weight if self.config.weighting == "truncated-snr" else (
            snr_plus_one_weight
        )
        return weigh(sigma) * squared_l2_sum(denoised, target)

    def model(self, network: nn.Module) -> DiffusionModel:
        """Return a network's reading as a diffusion model."""
        return MODELS[self.config.parameterization](network, self.sigma_data)

    def grid(self, steps: int) -> Tensor:
        """Ascending noise levels ``[steps + 1]``; a grid of 2 N steps contains that of N."""
        if self.config.grid == "cosine":
            return cosine_time_to_sigma(torch.arange(steps + 1, dtype=torch.float64) / steps)
        c = self.config
        return karras_sigmas(steps + 1, c.sigma_min, c.sigma_max, c.rho)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """DDIM with the student trained for exactly ``nfe`` steps."""
        stages = halving_stages(self.config.start_steps, self.config.end_steps)
        if nfe not in stages:
            raise Declined(
                f"progressive distillation from {self.config.start_steps} steps has students of "
                f"{', '.join(map(str, stages))} steps, none of {nfe}"
            )
        if sigmas is not None:
            raise Declined("a student of progressive distillation knows only its own noise levels")
        grid = self.grid(nfe).flip(0)
        return SamplingPlan(nfe, "euler", tuple(grid[:-1].tolist()), variant=f"steps-{nfe}")

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """DDIM down to the grid's end; the last cosine step returns the prediction itself."""
        model = self.model(nets["model"])
        end = 0.0 if self.config.grid == "cosine" else self.config.sigma_min
        grid = torch.tensor([*plan.sigmas, end], dtype=torch.float64, device=noise.device)

        def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return model.denoise(x.float(), sigma.float(), labels).double()

        return euler(denoise, noise.double() * grid[0], grid, labels=labels).float()
