"""MultiStep consistency models: distillation and training.

Heek et al. 2024, arXiv:2403.06807 (no official code). Noise levels are cut into as many segments as
the student will take steps; inside a segment it is a consistency model that ends at the segment's
end. From any level the teacher makes one small step, the student itself (behind a stop-gradient,
under the same dropout mask) jumps the rest, and the student regresses on the one jump that ends
there. In the ``training`` form the teacher's prediction is the clean image.

``segments`` names the students to be trained, one phase each, all from the same initial weights: a
student of S segments samples in S steps. Two forms:

- ``cosine``, the paper's: segments uniform in the time of the cosine schedule, teacher steps by
  aDDIM, weight ``SNR + 1``. The first level's ``logsnr`` is -20; infinite noise has no EDM level.
- ``karras``, of EpiGenomicsCode/edm (unofficial, with a released checkpoint): Karras grids of the
  student and, finer, of the teacher; Heun's steps; edges drawn by EDM's lognormal; weight 1 / c_out
  of a norm, or its square of a squared error. Its last segment, from ``student_sigma_min`` to zero,
  is nearly trivial at 0.002; a larger value leaves it something to do.

Forward equivalents per training step: distillation 5 (student 3, itself 1, teacher 1), with Heun 6;
training 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.distances import l2_mean, pseudo_huber, squared_l2_sum
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import choose_bin, choose_uniformly, sampling_sigmas
from cmbench.diffusion.models import DiffusionModel
from cmbench.diffusion.segments import (
    addim_denoised,
    edge_probabilities,
    heun_denoised,
    refined_sigmas,
)
from cmbench.diffusion.solvers import ddim_step, two_step_target
from cmbench.diffusion.weightings import edm_weight, snr, snr_plus_one_weight
from cmbench.plugin.config import MethodConfig, Positive
from cmbench.plugin.method import (
    Batch,
    ConsistencyFunction,
    Draws,
    Kit,
    Method,
    Nets,
    Objective,
    Phase,
    Progress,
    SamplingPlan,
)
from cmbench.training.randomness import RandomState, replayed
from cmbench.training.resident import resident
from cmbench_plugins._jumps import consistency_of_jumps, jumps_plan, sample_by_jumps
from cmbench_plugins.edm import MODELS, channel_copies, initial_network

__all__ = ["MSCD", "MSCDConfig"]


Count = Annotated[int, Field(ge=1)]


class MSCDConfig(MethodConfig):
    """Hyper-parameters of multistep consistency models; ``duration_kimg`` is a phase's."""

    parameterization: Literal["edm", "trigflow", "x", "both"] = Field(
        "edm", description="as the teacher's"
    )
    form: Literal["distillation", "training"] = Field(
        "distillation", description="steps of the teacher, or with the clean image"
    )
    segments: tuple[Count, ...] = Field(
        (1,), min_length=1, description="segments (= sampling steps) of the student of each phase"
    )
    grid: Literal["karras", "cosine"] = Field("karras", description="noise levels")
    sigma_min: Positive = Field(0.002, description="teacher's lowest level of the karras grid")
    sigma_max: Positive = Field(80.0, description="highest level of the karras grid")
    student_sigma_min: Positive = Field(
        0.002, description="student's lowest level of the karras grid, for 2 segments or more"
    )
    rho: Positive = Field(7.0, description="exponent of the karras grids")
    p_mean: float = Field(-1.2, description="mean of ln sigma of the drawn edges (karras)")
    p_std: Positive = Field(1.2, description="standard deviation of ln sigma (karras)")
    teacher_steps_start: int = Field(64, ge=1, description="teacher's steps in all at the start")
    teacher_steps_end: int = Field(1280, ge=1, description="teacher's steps in all at the end")
    annealing_share: float = Field(
        1.0, gt=0, le=1, description="share of a phase in which the teacher's steps grow"
    )
    solver: Literal["heun", "addim", "ddim"] = Field("heun", description="the teacher's step")
    variance: Literal["data", "snr"] = Field(
        "data",
        description="aDDIM's v: variance_factor times the squared error of the teacher, or "
        "0.1 / (2 + SNR)",
    )
    variance_factor: Positive = Field(0.75, description="share of the squared error in aDDIM's v")
    last_target: Literal["teacher", "data"] = Field(
        "teacher", description="what the edge to zero ends at: the teacher's prediction or the data"
    )
    metric: Literal["l2", "pseudo-huber"] = Field("pseudo-huber", description="distance")
    huber_c: Positive = Field(1e-4, description="c of pseudo-huber")
    clip_samples: bool = Field(
        True, description="clamp every denoised image to [-1, 1] in sampling, where the data lie"
    )


class MSCD(Method):
    """Multistep consistency distillation and training."""

    Config = MSCDConfig
    config: MSCDConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The student; with several phases also the weights that each starts from."""
        nets = {"model": initial_network(kit, self.config.parameterization, self.config)}
        if len(self.config.segments) > 1:
            copies = channel_copies(self.config.parameterization)
            nets["initial"] = kit.network(channel_copies=copies)
            nets["initial"].load_state_dict(nets["model"].state_dict())
        return nets

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """One phase per student."""
        return [
            Phase(
                f"steps-{count}",
                round(self.config.duration_kimg * 1000),
                (Objective(partial(self.phase_loss, count), ("model",), self.config.optimizer),),
                self.config.ema,
                start=self.restart if index > 0 else None,
                export=f"steps-{count}",
            )
            for index, count in enumerate(self.config.segments)
        ]

    def restart(self, nets: Nets) -> None:
        """Every student starts from the same weights."""
        nets["model"].load_state_dict(nets["initial"].state_dict())

    def phase_loss(
        self, segments: int, nets: Nets, batch: Batch, draws: Draws, progress: Progress
    ) -> Tensor:
        """``w d(f(x_t), x*)``: x* jumps to where teacher and student end (Algorithm 1)."""
        x0, labels = batch.images, batch.labels
        uniform = draws.uniform("index", x0[:, 0, 0, 0])
        sigma, sigma_next, sigma_end = self.edge(segments, self.teacher_steps(progress), uniform)
        x = x0 + append_dims(sigma, x0) * draws.normal("noise", x0)
        with torch.no_grad():
            first = self.teacher_step(x0, x, sigma, sigma_next, labels)
            x_next = ddim_step(x, first, sigma, sigma_next)

        student, randomness = self.model(nets["model"]), RandomState.of(x.device)
        denoised = student.denoise(x, sigma, labels)
        with torch.no_grad(), replayed(randomness):
            # Where the teacher's step ends at zero, it ends the segment: any level serves.
            level = torch.where(sigma_next > 0, sigma_next, sigma)
            second = student.denoise(x_next, level, labels)
            target = two_step_target(first, second, sigma, sigma_next, sigma_end)
        return self.distance(denoised, target, sigma)

    def teacher_steps(self, progress: Progress) -> int:
        """Teacher's steps in all at this point of the phase, growing in proportion."""
        c = self.config
        share = progress.nimg / max(progress.total_nimg, 1) / c.annealing_share
        growth = c.teacher_steps_end / c.teacher_steps_start
        return round(c.teacher_steps_start * growth ** min(share, 1.0))

    def edge(
        self, segments: int, teacher_steps: int, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Levels ``[N]`` before and after the teacher's step, and at the segment's end."""
        if self.config.grid == "cosine":
            per_segment = max(round(teacher_steps / segments), 1)
            count = per_segment * segments
            levels = resident(self.levels, count, like=uniform, dtype=uniform.dtype)
            i = 1 + choose_uniformly(count, uniform)
            end = (i - 1) // per_segment * per_segment
            return levels[i], levels[i - 1], levels[end]
        arguments = (segments, teacher_steps)
        levels = resident(self.fine_levels, *arguments, like=uniform)
        probabilities = resident(self.probabilities, *arguments, like=uniform)
        own = resident(self.levels, segments, like=uniform)
        i = 1 + choose_bin(probabilities, uniform)
        sigma_end = own[torch.searchsorted(own, levels[i]) - 1]
        sigma_next = torch.maximum(levels[i - 1], sigma_end)
        return levels[i].to(uniform), sigma_next.to(uniform), sigma_end.to(uniform)

    def levels(self, count: int) -> Tensor:
        """Ascending levels ``[count + 1]`` of a student of ``count`` steps, zero first."""
        c = self.config
        if c.grid == "karras":
            return sampling_sigmas(count, c.student_sigma_min, c.sigma_max, c.rho).flip(0)
        u = torch.arange(count + 1, dtype=torch.float64) / count
        return torch.tan(u * (math.pi / 2)).clamp(0.0, math.exp(10.0))

    def fine_levels(self, segments: int, teacher_steps: int) -> Tensor:
        """Ascending levels of the teacher's karras grid, zero first."""
        c = self.config
        intervals = segments - 1 if c.student_sigma_min == c.sigma_min else 0
        return refined_sigmas(teacher_steps, intervals, c.sigma_min, c.sigma_max, c.rho)

    def probabilities(self, segments: int, teacher_steps: int) -> Tensor:
        """Probability of each edge of the teacher's karras grid."""
        c = self.config
        levels = self.fine_levels(segments, teacher_steps)
        return edge_probabilities(levels, c.p_mean, c.p_std, c.rho)

    def teacher_step(
        self, x0: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None
    ) -> Tensor:
        """The denoised images with which DDIM makes the teacher's step."""
        c = self.config
        if c.form == "training":
            return x0
        denoise = self.distilled().denoise
        if c.solver == "heun":
            found = heun_denoised(denoise, x, sigma, sigma_next, labels)
        else:
            found = denoise(x, sigma, labels)
        if c.solver == "addim":
            error = c.variance_factor * l2_mean(found, x0)
            v = error if c.variance == "data" else 0.1 / (2 + snr(sigma))
            found = addim_denoised(x, found, sigma, sigma_next, v)
        if c.last_target == "data":
            found = torch.where(append_dims(sigma_next > 0, x), found, x0)
        return found

    def distance(self, denoised: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """``w d(f, x*)`` ``[N]``; on the karras grid a distance of F (an error of x by c_out)."""
        c = self.config
        squared = c.metric == "l2"
        if c.grid == "cosine":
            weight = snr_plus_one_weight(sigma)
            distance = l2_mean if squared else partial(pseudo_huber, c=c.huber_c)
        else:
            weight = edm_weight(sigma, self.sigma_data)
            weight = weight if squared else weight.sqrt()
            distance = squared_l2_sum if squared else partial(pseudo_huber, c=c.huber_c)
        return weight * distance(denoised, target)

    def model(self, network: nn.Module) -> DiffusionModel:
        """Return a network as a diffusion model."""
        return MODELS[self.config.parameterization](network, self.sigma_data)

    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        """The last student's denoiser, if it makes one jump."""
        return consistency_of_jumps(
            "a multistep consistency model", self.config.segments, self.model(nets["model"])
        )

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """A step per segment."""
        who = "a multistep consistency model"
        return jumps_plan(who, self.config.segments, self.levels, nfe, sigmas, sampler)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """DDIM jumps from segment end to segment end, the last to zero."""
        clip = self.config.clip_samples and self.data.bounded
        levels = (*plan.sigmas, 0.0)
        return sample_by_jumps(self.model(nets["model"]), noise, levels, labels, clip=clip)
