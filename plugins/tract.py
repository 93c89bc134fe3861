"""TRACT: denoising diffusion models with transitive closure time-distillation.

Berthelot et al. 2023, arXiv:2303.04248, and its official code. The fine grid of a teacher is cut
into as many segments as the student has steps. From any fine level the student learns to jump to
its segment's end: the teacher makes one fine step, a moving average of the student (the
self-teacher) makes the rest, and the student regresses on the one jump that ends there.

``steps`` is the schedule: (40, 1) distils 40 steps into one; (1024, 32, 1) first into 32, and then
those into one, the teacher being replaced by the student's first average (the student goes on from
its own weights). Every phase exports its generator. As released, the average is corrected for its
start; here the initial weights keep what ``decay`` leaves: 0.001 in the published recipes.

Two forms, as released. ``karras``: fine levels of a Karras grid and zero, Heun's step of the
teacher, squared error of the raw network's F. ``cosine``: levels uniform in the time of the cosine
schedule on ``logsnr`` in [-20, 20], DDIM steps of the teacher on clipped images, weight
``max(SNR, 1)``. Forward equivalents per training step: 6 with Heun (student 3, self-teacher 1,
teacher 2), 5 with DDIM. The released code replaces gradients that are not finite by zeros; here
training stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmbench.diffusion.distances import l2_mean, squared_l2_sum
from cmbench.diffusion.frames import append_dims, cosine_time_to_sigma
from cmbench.diffusion.grids import choose_uniformly, sampling_sigmas
from cmbench.diffusion.models import DiffusionModel
from cmbench.diffusion.segments import heun_denoised
from cmbench.diffusion.solvers import ddim_step, two_step_target
from cmbench.diffusion.weightings import edm_weight, truncated_snr_weight
from cmbench.plugin.config import Fraction, MethodConfig, Positive
from cmbench.plugin.method import (
    Batch,
    ConsistencyFunction,
    Draws,
    Kit,
    Method,
    Nets,
    Objective,
    Phase,
    PhaseStart,
    Progress,
    SamplingPlan,
)
from cmbench.training.resident import resident
from cmbench_plugins._averages import move_towards
from cmbench_plugins._jumps import consistency_of_jumps, jumps_plan, sample_by_jumps
from cmbench_plugins.edm import MODELS, channel_copies, initial_network

__all__ = ["TRACT", "TRACTConfig"]


class TRACTConfig(MethodConfig):
    """Hyper-parameters of TRACT; ``duration_kimg`` is a phase's."""

    parameterization: Literal["edm", "trigflow", "x", "both"] = Field(
        "edm", description="as the teacher's"
    )
    steps: tuple[int, ...] = Field(
        (40, 1), min_length=2, description="steps of the first teacher, then of each phase"
    )
    grid: Literal["karras", "cosine"] = Field("karras", description="fine noise levels")
    sigma_min: Positive = Field(0.002, description="lowest level of the karras grid before zero")
    sigma_max: Positive = Field(80.0, description="highest level of the karras grid")
    rho: Positive = Field(7.0, description="exponent of the karras grid")
    solver: Literal["heun", "ddim"] = Field(
        "heun", description="step of the first teacher; later teachers jump by DDIM"
    )
    self_teacher_decay: Fraction = Field(
        0.5, description="beta: decay per step of the self-teacher, corrected for its start"
    )
    clip_denoised: bool = Field(
        True,
        description="clamp the self-teacher's and the sampler's denoised images to [-1, 1], and on "
        "the cosine grid the teacher's, where the data lie there",
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for fine, coarse in pairwise(self.steps):
            if not 1 <= coarse < fine or fine % coarse:
                raise ValueError(
                    f"steps {list(self.steps)}: {coarse} after {fine}; allowed: each a divisor of "
                    "the one before and smaller"
                )
        return self


class TRACT(Method):
    """Transitive closure time-distillation."""

    Config = TRACTConfig
    config: TRACTConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """Student and self-teacher; with several phases also the later teachers' network."""
        nets = {"model": initial_network(kit, self.config.parameterization, self.config)}
        for name in ("self_teacher", "teacher")[: 2 if len(self.config.steps) > 2 else 1]:
            nets[name] = kit.network(channel_copies=channel_copies(self.config.parameterization))
            nets[name].load_state_dict(nets["model"].state_dict())
        return nets

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """One phase for each pair of neighbours in ``steps``."""
        phases = []
        for index, (fine, coarse) in enumerate(pairwise(self.config.steps)):
            loss = partial(self.phase_loss, fine, coarse)
            phases.append(
                Phase(
                    f"steps-{coarse}",
                    round(self.config.duration_kimg * 1000),
                    (Objective(loss, ("model",), self.config.optimizer),),
                    self.config.ema,
                    start=self.promote if index > 0 else None,
                    after_step=self.after_step,
                    export=f"steps-{coarse}",
                )
            )
        return phases

    def promote(self, nets: PhaseStart) -> None:
        """The student's average becomes the teacher of the next phase."""
        nets["teacher"].load_state_dict(nets.averaged("model"))

    def after_step(self, nets: Nets, progress: Progress) -> None:
        """``theta^- += (1 - beta) / (1 - beta^n) (theta - theta^-)`` after n steps of the phase.

        The first update copies the student.
        """
        n = progress.step + 1
        beta = self.config.self_teacher_decay
        move_towards(nets["self_teacher"], nets["model"], (1 - beta) / (1 - beta**n))

    def phase_loss(
        self, fine: int, coarse: int, nets: Nets, batch: Batch, draws: Draws, progress: Progress
    ) -> Tensor:
        """``w(sigma) ||x_student - x_target||^2`` from ``fine`` steps to ``coarse`` ones."""
        x0, labels = batch.images, batch.labels
        levels = resident(self.levels, fine, like=x0, dtype=x0.dtype)
        # Segments are equally likely, and so are the fine levels inside: all levels are.
        i = 1 + choose_uniformly(fine, draws.uniform("index", x0[:, 0, 0, 0]))
        per_segment = fine // coarse
        end = (i - 1) // per_segment * per_segment
        sigma, sigma_next, sigma_end = levels[i], levels[i - 1], levels[end]
        x = x0 + append_dims(sigma, x0) * draws.normal("noise", x0)

        with torch.no_grad():
            first = self.teacher_step(fine, nets, x, sigma, sigma_next, labels)
            x_next = ddim_step(x, first, sigma, sigma_next)
            # At zero the teacher's step ends the segment: any level serves there.
            level = torch.where(sigma_next > 0, sigma_next, sigma)
            self_teacher = self.model(nets["self_teacher"])
            second = self.clipped(self_teacher.denoise(x_next, level, labels))
            target = two_step_target(first, second, sigma, sigma_next, sigma_end)
        return self.distance(self.model(nets["model"]).denoise(x, sigma, labels), target, sigma)

    def teacher_step(
        self,
        fine: int,
        nets: Nets,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        """The denoised images with which DDIM makes one fine step of the phase's teacher."""
        first = fine == self.config.steps[0]
        teacher = self.distilled() if first else self.model(nets["teacher"])
        if first and self.config.solver == "heun":
            return heun_denoised(teacher.denoise, x, sigma, sigma_next, labels)
        denoised = teacher.denoise(x, sigma, labels)
        return self.clipped(denoised) if self.config.grid == "cosine" else denoised

    def distance(self, denoised: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """The mean squared error of F (karras), or ``max(SNR, 1)`` times a sum (cosine), ``[N]``.

        In EDM's preconditioning an error of F is an error of ``x`` divided by ``c_out``.
        """
        if self.config.grid == "karras":
            return edm_weight(sigma, self.sigma_data) * l2_mean(denoised, target)
        return truncated_snr_weight(sigma) * squared_l2_sum(denoised, target)

    def clipped(self, denoised: Tensor) -> Tensor:
        """``denoised`` in [-1, 1] where the data are."""
        clip = self.config.clip_denoised and self.data.bounded
        return denoised.clamp(-1, 1) if clip else denoised

    def model(self, network: nn.Module) -> DiffusionModel:
        """Return a network as a diffusion model."""
        return MODELS[self.config.parameterization](network, self.sigma_data)

    def levels(self, steps: int) -> Tensor:
        """Ascending levels ``[steps + 1]`` of a phase's fine grid, or of its student's jumps.

        The karras grid begins with zero, the cosine grid with ``logsnr`` 20.
        """
        c, finest = self.config, self.config.steps[0]
        if c.grid == "karras":
            all_levels = sampling_sigmas(finest, c.sigma_min, c.sigma_max, c.rho).flip(0)
        else:
            u = torch.arange(finest + 1, dtype=torch.float64) / finest
            all_levels = cosine_time_to_sigma(u)
        return all_levels[:: finest // steps]

    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        """The last student's denoiser, if it makes one jump."""
        return consistency_of_jumps(
            f"TRACT from {self.config.steps[0]} steps", self.config.steps, self.model(nets["model"])
        )

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """Equal jumps on the fine grid, as many as a student was trained for."""
        who = f"TRACT from {self.config.steps[0]} steps"
        return jumps_plan(who, self.config.steps[1:], self.levels, nfe, sigmas, sampler)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """DDIM jumps down to the grid's first level."""
        levels = (*plan.sigmas, float(self.levels(plan.nfe)[0]))
        clip = self.config.clip_denoised and self.data.bounded
        return sample_by_jumps(self.model(nets["model"]), noise, levels, labels, clip=clip)
