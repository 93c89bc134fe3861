"""Diff-Instruct: a one-step generator and a second network that learns the generator's scores.

Luo et al. 2023, arXiv:2305.18455, Algorithm 1, for the integral KL divergence. Needs a teacher,
from which both networks start. Two objectives: the second network is trained on generated images,
then the generator moves where teacher and second network disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import lognormal_sigmas
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.weightings import edm_weight
from cmbench.errors import Declined
from cmbench.plugin.config import MethodConfig, Positive
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


class DiffInstructConfig(MethodConfig):
    sigma_init: Positive = Field(2.5, description="noise level that the generator starts from")
    p_mean: float = Field(-1.2, description="mean of ln sigma at which scores are compared")
    p_std: Positive = Field(1.2, description="standard deviation of ln sigma there")


class DiffInstruct(Method):
    Config = DiffInstructConfig
    config: DiffInstructConfig
    follows_probability_flow = False

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The generator, which is sampled, and the network that learns its scores."""
        self.teacher = kit.teacher
        return {"model": kit.student("edm"), "score": kit.student("edm")}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """One phase with two optimizers, in the order of Algorithm 1."""
        c = self.config
        score = Objective(self.score_loss, ("score",), c.optimizer)
        generator = Objective(self.generator_loss, ("model",), c.optimizer)
        return [Phase("train", round(c.duration_kimg * 1000), (score, generator), c.ema)]

    def generated(self, nets: Nets, noise: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        x = sigma * noise
        return self.denoiser(nets["model"]).denoise(x, x.new_full((len(x),), sigma), labels)

    def denoiser(self, network: nn.Module) -> EDMModel:
        return EDMModel(network, self.sigma_data)

    def noisy(self, x: Tensor, draws: Draws, name: str) -> tuple[Tensor, Tensor]:
        level = draws.normal(f"{name}-level", x[:, 0, 0, 0])
        sigma = lognormal_sigmas(level, self.config.p_mean, self.config.p_std)
        return x + append_dims(sigma, x) * draws.normal(f"{name}-noise", x), sigma

    def score_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """EDM's loss on generated images."""
        with torch.no_grad():
            z = draws.normal("score-z", batch.images)
            x = self.generated(nets, z, self.config.sigma_init, batch.labels)
            noisy, sigma = self.noisy(x, draws, "score")
        error = self.denoiser(nets["score"]).denoise(noisy, sigma, batch.labels) - x
        return edm_weight(sigma, self.sigma_data) * error.square().flatten(1).sum(1)

    def generator_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """A loss whose gradient is the weighted difference of the two scores (Eq. 3.2)."""
        if self.teacher is None:
            raise RuntimeError("training needs a teacher: set teacher in the recipe")
        z = draws.normal("z", batch.images)
        x = self.generated(nets, z, self.config.sigma_init, batch.labels)
        with torch.no_grad():
            noisy, sigma = self.noisy(x, draws, "generator")
            fake = self.denoiser(nets["score"]).denoise(noisy, sigma, batch.labels)
            real = self.teacher.model.denoise(noisy, sigma, batch.labels)
            gradient = (fake - real) / append_dims(sigma, x)
        return (gradient * x).flatten(1).sum(1)

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """One evaluation at ``sigma_init``."""
        levels = tuple(sigmas or (self.config.sigma_init,))
        if nfe != 1 or len(levels) != 1 or sampler not in (None, "one-step"):
            raise Declined(f"a one-step generator has one noise level: NFE {nfe}, {levels}")
        return SamplingPlan(1, "one-step", levels)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """The generator's image of the noise."""
        return self.generated(nets, noise, plan.sigmas[0], labels)
