"""Knowledge distillation of a sampler: one network call from noise to the teacher's image.

Luhman & Luhman 2021, arXiv:2101.02388 ("Denoising Student"), and its official code
(tcl9876/Denoising_Student). Before training, a deterministic solver makes pairs of the teacher:
unit noise ``z`` and its image ``y``. The student is trained on ``d(f(z), y)``: l1 for CIFAR-10,
squared l2 for larger images, both summed over values, or LPIPS. Data are not used.

``output = "denoised"`` is the student in EDM's frame: ``f(z) = D(sigma_max z, sigma_max)``, read as
the teacher's network is. ``"residual"`` is the paper's, for networks that predict noise:
``f(z) = z - F(z, c_noise(sigma_max))``.

``solver = "ddim-quadratic"`` and ``"ddim-linear"`` are the paper's: DDIM on DDPM's steps. The code
takes ``z`` itself for the state at the first of its indices (800 when quadratic), whose variance is
one too, while the student is told step 999. Indices that it lists several times are evaluated once.

One graded call per training step (3 forward equivalents); the teacher is called for the pairs only,
1,024,000 x 100 times in the paper. Samples: one evaluation. Published FID, CIFAR-10: 9.36.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cmbench.diffusion.grids import ddpm_sigmas
from cmbench.diffusion.models import DiffusionModel, EDMModel
from cmbench.diffusion.preconditioning import edm_scalings
from cmbench.diffusion.solvers import euler, float64_denoiser
from cmbench.errors import Declined
from cmbench.plugin.config import Positive
from cmbench.plugin.method import (
    Batch,
    Draws,
    GeneratedData,
    Kit,
    Nets,
    Phase,
    Progress,
    SamplingPlan,
)
from cmbench_plugins._distances import MetricConfig, MetricMethod
from cmbench_plugins._jumps import one_step_plan
from cmbench_plugins._solvers import SOLVERS, STOCHASTIC, evaluated_sigmas, solved
from cmbench_plugins.edm import initial_network

__all__ = ["KnowledgeDistillation", "KnowledgeDistillationConfig"]


def _quadratic(steps: int) -> list[int]:
    return [int(root**2 + 1e-9) for root in np.linspace(0, math.sqrt(800), steps)]


def _linear(steps: int) -> list[int]:
    return [step * (1000 // steps) for step in range(steps)]


#: The paper's choices of DDPM's steps, ascending, by the name of the solver.
DDIM_INDICES: dict[str, Callable[[int], list[int]]] = {
    "ddim-quadratic": _quadratic,
    "ddim-linear": _linear,
}
PAIR_SOLVERS = (*DDIM_INDICES, *(name for name in SOLVERS if name not in STOCHASTIC))


class KnowledgeDistillationConfig(MetricConfig):
    """Hyper-parameters of knowledge distillation."""

    metric: Literal["l2", "l1", "pseudo-huber", "lpips"] = Field(
        "l1", description="distance of the student's image from the teacher's"
    )
    pairs: int = Field(1_024_000, ge=1, description="pairs that the teacher makes")
    pair_dtype: Literal["float16", "float32"] = Field(
        "float16", description="what the teacher's images are stored in"
    )
    solver: str = Field(
        "heun", description="how the teacher makes its images: " + ", ".join(PAIR_SOLVERS)
    )
    solver_nfe: int = Field(
        35, ge=1, le=1000, description="network evaluations per pair; steps for the paper's DDIM"
    )
    output: Literal["denoised", "residual"] = Field(
        "denoised", description="the student's image: D(sigma_max z), or the paper's z - F(z)"
    )
    sigma_min: Positive = Field(0.002, description="last noise level of the solver before zero")
    sigma_max: Positive = Field(80.0, description="noise level that pairs and the student start at")
    rho: Positive = Field(7.0, description="exponent of the solver's noise-level grid")
    clip_samples: bool = Field(
        True, description="clamp images to [-1, 1], where the data lie there"
    )

    @field_validator("solver")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PAIR_SOLVERS:
            raise ValueError(f"not one of {', '.join(PAIR_SOLVERS)}")
        return name

    @model_validator(mode="after")
    def _affordable(self) -> KnowledgeDistillationConfig:
        if self.solver in SOLVERS:
            try:
                SOLVERS[self.solver].steps(self.solver_nfe)
            except Declined as reason:
                raise ValueError(f"solver_nfe: {reason}") from reason
        return self


class KnowledgeDistillation(MetricMethod):
    """A student of a sampler's pairs of noise and image."""

    Config = KnowledgeDistillationConfig
    config: KnowledgeDistillationConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The student, from the teacher's weights."""
        return {"model": initial_network(kit, "edm", self.config)}

    # ---- the teacher's pairs -------------------------------------------------------------------

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """One phase, on pairs."""
        return [replace(phase, generated=self.pairs()) for phase in super().phases(nets)]

    def pairs(self) -> GeneratedData:
        """What the teacher is asked for."""
        c, nfe = self.config, self.config.solver_nfe
        levels = f"sigma {c.sigma_max:g} to {c.sigma_min:g}, rho {c.rho:g}"
        if c.solver in DDIM_INDICES:
            nfe, levels = len(self.ddim_sigmas()) - 1, f"{c.solver_nfe} steps"
        how = f"{c.solver}, {levels}" + (", clipped" if self.clips else "")
        return GeneratedData(c.pairs, self.make, how, nfe, dtype=c.pair_dtype)

    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Return the teacher's images of unit noise."""
        c, teacher = self.config, self.distilled()
        if c.solver in DDIM_INDICES:
            images = self.ddim(teacher, noise, labels)
        else:
            sigmas = evaluated_sigmas(c.solver, c.solver_nfe, c.sigma_min, c.sigma_max, c.rho)
            images = solved(teacher, c.solver, c.solver_nfe, noise, sigmas, c.sigma_min, labels)
        return images.clamp(-1, 1) if self.clips else images

    def ddim(self, teacher: DiffusionModel, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The paper's sampler: ``noise`` is the variance-preserving state at its first level."""
        sigmas = self.ddim_sigmas()
        x = noise.double() * (1 + sigmas[0] ** 2).sqrt()
        return euler(float64_denoiser(teacher, noise.dtype), x, sigmas, labels=labels).to(noise)

    def ddim_sigmas(self) -> Tensor:
        """The paper's noise levels, descending to zero."""
        indices = {*DDIM_INDICES[self.config.solver](self.config.solver_nfe)}
        sigmas = ddpm_sigmas(torch.tensor(sorted(indices, reverse=True)))
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])

    @property
    def clips(self) -> bool:
        """Whether images are clamped to [-1, 1]."""
        return self.config.clip_samples and self.data.bounded

    # ---- the student ---------------------------------------------------------------------------

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``d(f(z), y)``; l1 and squared l2 are summed over values."""
        noise, target = batch.pair
        distance = self.distance(self.student(nets, noise, batch.labels), target)
        summed = self.config.metric in ("l1", "l2")
        return target[0].numel() * distance if summed else distance

    def student(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        """``f(z)``, the student's image of unit noise, in one evaluation."""
        sigma = torch.full_like(noise[:, 0, 0, 0], self.config.sigma_max)
        if self.config.output == "residual":
            c_noise = edm_scalings(sigma, self.sigma_data).c_noise
            residual: Tensor = nets["model"](noise, c_noise, labels)
            return noise - residual
        model = EDMModel(nets["model"], self.sigma_data)
        return model.denoise(self.config.sigma_max * noise, sigma, labels)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """One evaluation."""
        return one_step_plan("knowledge distillation", self.config.sigma_max, nfe, sigmas, sampler)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """``f(noise)``."""
        images = self.student(nets, noise, labels)
        return images.clamp(-1, 1) if self.clips else images
