"""Score distillation: Diff-Instruct and SiD.

A one-step generator ``G(z) = D(sigma_init z, sigma_init)`` starts from the teacher's denoiser. Its
samples are noised; where they are too likely is the difference of two denoisers there, the
teacher's ``D_real`` and that of a second network, ``D_fake``, which is trained on the generator's
samples all the while. The two networks take turns.

- Diff-Instruct (Luo et al. 2023, arXiv:2305.18455): gradient ``D_fake - D_real``.
- SiD (Zhou et al. 2024, arXiv:2404.04057): a loss whose gradient passes through both denoisers.

No data are used but the labels of a batch. The released codes evaluate both denoisers in training
mode under one dropout mask (on CUDA); here the teacher has none, and the recipes none at all. The
released SiD drops samples that are not finite; here training stops. Losses are no measure of
progress.

Forward equivalents per training step (3 for a graded pass, 2 for one with a gradient to its input
only): Diff-Instruct 9, SiD 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.distances import squared_l2_sum
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import lognormal_sigmas, power_sigmas
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.score_distillation import diff_instruct_loss, identity_loss
from cmbench.diffusion.weightings import edm_weight
from cmbench.plugin.config import MethodConfig, NonNegative, OptimizerConfig, Positive
from cmbench.plugin.method import Batch, Draws, Kit, Method, Nets, Objective, Progress, SamplingPlan
from cmbench_plugins._jumps import one_step_plan
from cmbench_plugins.edm import initial_network

__all__ = ["DiffInstruct", "ScoreConfig", "ScoreDistillation", "SiD"]


class ScoreConfig(MethodConfig):
    """What every method of score distillation has."""

    sigma_init: Positive = Field(80.0, description="level at which the generator reads its noise")
    generator_every: int = Field(
        1, ge=1, description="steps (updates of the fake score) per update of the generator"
    )
    fake_optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(lr=1e-5, betas=(0.0, 0.999)),
        description="optimizer of the fake score, and of the discriminator",
    )
    sigma_min: Positive = Field(0.002, description="lowest level that samples are noised to")
    sigma_max: Positive = Field(80.0, description="highest level that samples are noised to")
    rho: Positive = Field(7.0, description="exponent of the distribution of levels")
    p_mean: float = Field(-1.2, description="mean of ln sigma where levels are lognormal")
    p_std: Positive = Field(1.2, description="standard deviation of ln sigma there")
    clip_samples: bool = Field(
        True, description="clamp samples to [-1, 1], where the data lie there"
    )


class ScoreDistillation(Method):
    """A generator and the score of its samples, in turns."""

    Config: ClassVar[type[MethodConfig]] = ScoreConfig
    config: ScoreConfig
    follows_probability_flow = False

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """Generator and fake score, both from the teacher's weights."""
        return {"model": initial_network(kit, "edm", self.config), "fake": kit.student("edm")}

    def objectives(self, nets: Nets) -> tuple[Objective, ...]:
        """The networks take turns, the fake score first."""
        c = self.config
        generator = Objective(self.generator_loss, ("model",), c.optimizer, every=c.generator_every)
        return (*self.critics(), generator)

    def critics(self) -> tuple[Objective, ...]:
        """What is trained against the generator."""
        return (Objective(self.fake_loss, ("fake",), self.config.fake_optimizer),)

    def generate(self, nets: Nets, z: Tensor, labels: Tensor | None) -> Tensor:
        """``G(z) = D(sigma_init z, sigma_init)``."""
        sigma = torch.full_like(z[:, 0, 0, 0], self.config.sigma_init)
        return self.model(nets["model"]).denoise(self.config.sigma_init * z, sigma, labels)

    def model(self, network: Any) -> EDMModel:
        """A network as a denoiser."""
        return EDMModel(network, self.sigma_data)

    def fake_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """EDM's loss on the generator's samples."""
        with torch.no_grad():
            g = self.generate(nets, draws.normal("latent-fake", batch.images), batch.labels)
        sigma = self.fake_sigmas("sigma-fake", draws, g[:, 0, 0, 0])
        y = g + append_dims(sigma, g) * draws.normal("noise-fake", g)
        fake = self.model(nets["fake"]).denoise(y, sigma, batch.labels)
        return edm_weight(sigma, self.sigma_data) * squared_l2_sum(fake, g)

    def fake_sigmas(self, name: str, draws: Draws, like: Tensor) -> Tensor:
        """Levels that the fake score is trained at: EDM's."""
        c = self.config
        return lognormal_sigmas(draws.normal(name, like), c.p_mean, c.p_std)

    def generator_sigmas(self, draws: Draws, like: Tensor) -> Tensor:
        """Levels that the two denoisers are compared at: as the fake score's."""
        return self.fake_sigmas("sigma", draws, like)

    def generator_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """The loss of fresh samples, noised."""
        g = self.generate(nets, draws.normal("latent", batch.images), batch.labels)
        sigma = self.generator_sigmas(draws, g[:, 0, 0, 0])
        y = g + append_dims(sigma, g) * draws.normal("noise", g)
        return self.samples_loss(nets, g, y, sigma, batch.labels)

    def samples_loss(
        self, nets: Nets, g: Tensor, y: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> Tensor:
        """The loss ``[N]`` of samples ``g`` with noisy copies ``y``."""
        raise NotImplementedError

    def denoised(
        self, nets: Nets, y: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``D_fake`` and ``D_real`` of noisy samples."""
        fake = self.model(nets["fake"]).denoise(y, sigma, labels)
        return fake, self.distilled().denoise(y, sigma, labels)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """One evaluation."""
        return one_step_plan("score distillation", self.config.sigma_init, nfe, sigmas, sampler)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """``G(noise)``."""
        g = self.generate(nets, noise, labels)
        return g.clamp(-1, 1) if self.config.clip_samples and self.data.bounded else g


class DiffInstructConfig(ScoreConfig):
    """Hyper-parameters of Diff-Instruct (readme of its code)."""

    sigma_init: Positive = Field(1.0, description="level at which the generator reads its noise")


class DiffInstruct(ScoreDistillation):
    """The integral KL divergence's gradient."""

    Config = DiffInstructConfig

    def samples_loss(
        self, nets: Nets, g: Tensor, y: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> Tensor:
        """``sum of sg(D_fake(y) - D_real(y)) G``."""
        with torch.no_grad():
            fake, real = self.denoised(nets, y, sigma, labels)
        return diff_instruct_loss(g, fake, real)


class SiDConfig(ScoreConfig):
    """Hyper-parameters of SiD (run_sid.sh)."""

    sigma_init: Positive = Field(2.5, description="level at which the generator reads its noise")
    alpha: float = Field(1.2, description="weight of the squared gap of the two denoisers")
    t_max: float = Field(
        0.8, gt=0, le=1, description="share of the Karras levels, from the small end, compared at"
    )
    loss_scale: Positive = Field(100.0, description="factor of the generator's loss")
    scale_floor: NonNegative = Field(
        0.0, description="added to mean |G - D_real|; for images of few values"
    )


class SiD(ScoreDistillation):
    """Score identity distillation."""

    Config = SiDConfig
    config: SiDConfig

    def generator_sigmas(self, draws: Draws, like: Tensor) -> Tensor:
        """Uniform in ``sigma^(1/rho)`` up to the share ``t_max`` of the range."""
        c = self.config
        return power_sigmas(c.t_max * draws.uniform("sigma", like), c.sigma_min, c.sigma_max, c.rho)

    def samples_loss(
        self, nets: Nets, g: Tensor, y: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Graded through both denoisers, whose weights are frozen."""
        c = self.config
        fake, real = self.denoised(nets, y, sigma, labels)
        return c.loss_scale * identity_loss(g, fake, real, c.alpha, c.scale_floor)
