"""Distribution matching distillation: DMD2 and f-distill.

Score distillation (see :mod:`cmbench_plugins.score_distillation`) whose gradient at a sample is
``(D_fake - D_real) / mean |G - D_real|``.

- DMD2 (Yin et al. 2024, arXiv:2405.14867): the generator moves in every fifth step only.
  ``gan_weight`` adds a GAN term on noised images.
- f-distill (Xu et al. 2025, arXiv:2502.15681, as in FastGen): images are weighted by ``h(r)``, r
  the discriminator's ratio of densities. Ratios are not normalised by noise level, which FastGen
  does for ImageNet-64 (rate 0.5) and not for CIFAR-10 (rate 0).

Real images are used where there is a discriminator only. The released DMD2 puts its head on the
bottleneck of D_fake, f-distill's on the teacher's. Networks here have no door to their bottleneck:
the discriminator is a network of its own that starts from the teacher's, and its raw output's mean
over pixels is an image's logits, one per channel. So its loss does not move D_fake.

Where DMD2 draws labels uniformly, ours are the dataset's. In a step in which the generator moves,
the fake score is trained before it, on other noise; there after it, on the same images. Forward
equivalents per training step: 5 on average, with a discriminator 12.4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import choose_uniformly, karras_sigmas
from cmbench.diffusion.preconditioning import edm_scalings
from cmbench.diffusion.score_distillation import (
    density_ratio,
    discriminator_loss,
    divergence_weights,
    generator_gan_loss,
    matching_direction,
    matching_loss,
)
from cmbench.plugin.config import MethodConfig, NonNegative
from cmbench.plugin.method import Batch, Draws, Kit, Nets, Objective, Progress
from cmbench.training.resident import resident
from cmbench_plugins.score_distillation import ScoreConfig, ScoreDistillation

__all__ = ["DMD2", "DMD2Config", "FDistill", "FDistillConfig"]


class DMD2Config(ScoreConfig):
    """Hyper-parameters of DMD2 (its ImageNet-64 scripts)."""

    generator_every: int = Field(
        5, ge=1, description="steps (updates of the fake score) per update of the generator"
    )
    n_points: int = Field(1000, ge=2, description="levels of the Karras grid that are drawn from")
    edge_share: float = Field(
        0.02, ge=0, lt=0.5, description="share of the levels at both ends without comparison"
    )
    scale_floor: NonNegative = Field(0.0, description="added to mean |G - D_real| (FastGen: 1e-6)")
    gan_weight: NonNegative = Field(
        0.0, description="weight of the generator's GAN term; 0 without a discriminator"
    )


class DMD2(ScoreDistillation):
    """Improved distribution matching distillation."""

    Config: ClassVar[type[MethodConfig]] = DMD2Config
    config: DMD2Config

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """Also a discriminator, if there is a GAN term."""
        nets = super().build(kit)
        return nets | {"discriminator": kit.student("edm")} if self.has_discriminator() else nets

    def has_discriminator(self) -> bool:
        """Whether one is trained."""
        return self.config.gan_weight > 0

    def critics(self) -> tuple[Objective, ...]:
        """The fake score, then the discriminator."""
        if not self.has_discriminator():
            return super().critics()
        optimizer = self.config.fake_optimizer
        judge = Objective(self.discriminator_loss, ("discriminator",), optimizer)
        return (*super().critics(), judge)

    def fake_sigmas(self, name: str, draws: Draws, like: Tensor) -> Tensor:
        """Any level of the grid is equally likely."""
        return self.levels(like)[choose_uniformly(self.config.n_points, draws.uniform(name, like))]

    def generator_sigmas(self, draws: Draws, like: Tensor) -> Tensor:
        """As the fake score's, without the levels at the ends."""
        count, share = self.config.n_points, self.config.edge_share
        first, last = int(share * count), min(int((1 - share) * count), count - 1)
        index = choose_uniformly(last - first + 1, draws.uniform("sigma", like))
        return self.levels(like)[first + index]

    def levels(self, like: Tensor) -> Tensor:
        """The ascending grid."""
        c = self.config
        arguments = (c.n_points, c.sigma_min, c.sigma_max, c.rho)
        return resident(karras_sigmas, *arguments, like=like, dtype=like.dtype)

    def fake_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """EDM's loss as a mean over values."""
        return super().fake_loss(nets, batch, draws, progress) / batch.images[0].numel()

    def samples_loss(
        self, nets: Nets, g: Tensor, y: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> Tensor:
        """``(G - sg(G - h direction))^2 / 2``, and the GAN term."""
        with torch.no_grad():
            fake, real = self.denoised(nets, y, sigma, labels)
        direction = matching_direction(g, fake, real, self.config.scale_floor)
        if not self.has_discriminator():
            return matching_loss(g, direction)
        logits = self.logits(nets["discriminator"], y, sigma, labels)
        weight = append_dims(self.image_weights(logits.detach()), g)
        gan = self.config.gan_weight * generator_gan_loss(logits)
        return matching_loss(g, weight * direction) + gan

    def image_weights(self, logits: Tensor) -> Tensor:
        """``h(r)`` of each image ``[N]``: the reverse KL divergence's, 1."""
        return torch.ones_like(logits[:, 0])

    def discriminator_loss(
        self, nets: Nets, batch: Batch, draws: Draws, progress: Progress
    ) -> Tensor:
        """Tell noised samples from noised images, each at levels of its own."""
        x, labels = batch.images, batch.labels
        with torch.no_grad():
            g = self.generate(nets, draws.normal("latent-judged", x), labels)
        logits = []
        for name, images in (("judged", g), ("true", x)):
            sigma = self.fake_sigmas(f"sigma-{name}", draws, x[:, 0, 0, 0])
            noisy = images + append_dims(sigma, x) * draws.normal(f"noise-{name}", x)
            logits.append(self.logits(nets["discriminator"], noisy, sigma, labels))
        return discriminator_loss(*logits)

    def logits(self, network: Any, y: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The discriminator's logits ``[N, C]`` of noisy images; positive for real ones."""
        scalings = edm_scalings(sigma, self.sigma_data)
        raw: Tensor = network(append_dims(scalings.c_in, y) * y, scalings.c_noise, labels)
        return raw.flatten(2).mean(2)


class FDistillConfig(DMD2Config):
    """Hyper-parameters of f-distill (FastGen's configurations)."""

    divergence: Literal[
        "reverse-kl",
        "forward-kl",
        "jensen-shannon",
        "softened-reverse-kl",
        "neyman",
        "hellinger",
        "jeffreys",
    ] = Field("forward-kl", description="f, whose weight h(r) an image has")
    weight_group: int = Field(
        4,
        ge=1,
        description="images in a row over which h is divided by its mean (released: a GPU's batch)",
    )
    scale_floor: NonNegative = Field(1e-6, description="added to mean |G - D_real|")
    gan_weight: NonNegative = Field(1e-3, description="weight of the generator's GAN term")


class FDistill(DMD2):
    """DMD2 for any f-divergence."""

    Config = FDistillConfig
    config: FDistillConfig

    def has_discriminator(self) -> bool:
        """Always: it gives the ratios."""
        return True

    def objectives(self, nets: Nets) -> tuple[Objective, ...]:
        """The generator's loss is one of groups."""
        *critics, generator = super().objectives(nets)
        return (*critics, replace(generator, group=self.config.weight_group))

    def image_weights(self, logits: Tensor) -> Tensor:
        """``h(r)`` over its mean in each group."""
        c = self.config
        return divergence_weights(c.divergence, density_ratio(logits), c.weight_group)
