"""Diff-Instruct: a one-step generator and a second network that learns the generator's scores.

Luo et al. 2023, arXiv:2305.18455, Algorithm 1, for the integral KL divergence. Needs a teacher,
from which both networks start. Two objectives: the second network is trained on generated images,
then the generator moves where teacher and second network disagree.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import lognormal_sigmas
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.score_distillation import diff_instruct_loss
from cmbench.diffusion.weightings import edm_weight
from cmbench.plugin.config import MethodConfig, Positive
from cmbench.plugin.method import Batch, Draws, Kit, Method, Nets, Objective, Progress, SamplingPlan


class DiffInstructConfig(MethodConfig):
    sigma_init: Positive = Field(2.5, description="noise level that the generator starts from")


class DiffInstruct(Method):
    Config = DiffInstructConfig
    config: DiffInstructConfig
    follows_probability_flow = False
    sampler = "one-step"

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The generator, which is sampled, and the network that learns its scores."""
        return {"model": kit.student("edm"), "score": kit.student("edm")}

    def objectives(self, nets: Nets) -> tuple[Objective, ...]:
        """The networks take turns, in the order of Algorithm 1."""
        score = Objective(self.score_loss, ("score",), self.config.optimizer)
        return score, Objective(self.generator_loss, ("model",), self.config.optimizer)

    def generated(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, sigma: float | None = None
    ) -> Tensor:
        """``D(sigma z, sigma)`` of the generator, at ``sigma_init`` by default."""
        sigmas = torch.full_like(noise[:, 0, 0, 0], sigma or self.config.sigma_init)
        x = append_dims(sigmas, noise) * noise
        return self.denoiser(nets["model"]).denoise(x, sigmas, labels)

    def denoiser(self, network: nn.Module) -> EDMModel:
        return EDMModel(network, self.sigma_data)

    def noisy(self, x: Tensor, draws: Draws, name: str) -> tuple[Tensor, Tensor]:
        """Noised images at EDM's distribution of levels, and the levels."""
        sigma = lognormal_sigmas(draws.normal(f"{name}-level", x[:, 0, 0, 0]), -1.2, 1.2)
        return x + append_dims(sigma, x) * draws.normal(f"{name}-noise", x), sigma

    def score_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """EDM's loss on generated images."""
        with torch.no_grad():
            x = self.generated(nets, draws.normal("score-z", batch.images), batch.labels)
            noisy, sigma = self.noisy(x, draws, "score")
        error = self.denoiser(nets["score"]).denoise(noisy, sigma, batch.labels) - x
        return edm_weight(sigma, self.sigma_data) * error.square().flatten(1).sum(1)

    def generator_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """A loss whose gradient is the difference of the two denoisers (Eq. 3.2, weighted)."""
        x = self.generated(nets, draws.normal("z", batch.images), batch.labels)
        with torch.no_grad():
            noisy, sigma = self.noisy(x, draws, "generator")
            fake = self.denoiser(nets["score"]).denoise(noisy, sigma, batch.labels)
            real = self.distilled().denoise(noisy, sigma, batch.labels)
        return diff_instruct_loss(x, fake, real)

    def sampling_levels(self, nfe: int) -> list[float]:
        """One evaluation."""
        return [self.config.sigma_init]

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """The generator's image of the noise."""
        return self.generated(nets, noise, labels, plan.sigmas[0])
