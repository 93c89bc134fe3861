"""Consistency models: distillation (CD) and training (CT).

Song et al. 2023, "Consistency Models", arXiv:2303.01469, Algorithms 2 and 3. CD needs a teacher
and starts from it; CT needs none. Forward equivalents per training step (diffusion training: 3): CD
6 with Heun (student 3, target 1, teacher 2) or 5 with Euler, CT 4.

``f`` has the boundary scalings of App. C, so that ``f(x, sigma_min) = x`` exactly. The loss is the
*mean* over values for l2 and l1, as in both official repositories. Weight lambda = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmbench.diffusion.consistency_sampling import multistep_consistency
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import (
    choose_uniformly,
    karras_sigmas,
    sqrt_curriculum,
    target_ema_decay,
)
from cmbench.diffusion.models import EDMConsistency
from cmbench.diffusion.solvers import ddim_step, heun_step
from cmbench.plugin.config import Fraction, MethodConfig, Positive
from cmbench.plugin.method import (
    Batch,
    ConsistencyFunction,
    Draws,
    Kit,
    Method,
    Nets,
    Progress,
    SamplingPlan,
)
from cmbench.training.randomness import RandomState, replayed
from cmbench.training.resident import resident
from cmbench_plugins._averages import move_towards
from cmbench_plugins._distances import MetricConfig, MetricMethod
from cmbench_plugins._sigmas import multistep_plan
from cmbench_plugins.edm import initial_network

__all__ = ["CD", "CT", "CDConfig", "CMConfig", "CTConfig", "ConsistencyConfig", "ConsistencyMethod"]


class ConsistencyConfig(MethodConfig):
    """What every consistency method in the EDM frame has."""

    sigma_min: Positive = Field(0.002, description="epsilon: noise level of the boundary condition")
    sigma_max: Positive = Field(80.0, description="T: noise level that sampling starts from")
    mid_sigmas: tuple[float, ...] = Field(
        (), description="noise levels of the steps after the first, most important first"
    )
    clip_samples: bool = Field(
        True, description="clamp every output to [-1, 1] in sampling, where the data lie there"
    )


class CMConfig(ConsistencyConfig, MetricConfig):
    """Hyper-parameters that CD and CT share (Table 3 and App. C)."""

    rho: Positive = Field(7.0, description="exponent of the noise-level grid")


class CDConfig(CMConfig):
    """Hyper-parameters of CD."""

    n_points: int = Field(18, ge=2, description="N: number of noise levels")
    solver: Literal["heun", "euler"] = Field("heun", description="the teacher's ODE step")
    target_ema: Fraction = Field(0.0, description="mu: decay per step of the target network")


class CTConfig(CMConfig):
    """Hyper-parameters of CT."""

    s0: int = Field(2, ge=2, description="number of noise levels at the start")
    s1: int = Field(150, ge=2, description="number of noise levels at the end, less one")
    mu0: Fraction = Field(0.9, description="decay per step of the target network at the start")
    mu_exponent: Literal["paper", "released-code"] = Field(
        "paper", description="mu(k) = exp(s0 ln mu0 / N(k)), or / (N(k) - 1) as both repositories"
    )

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.s0 > self.s1 + 1:
            raise ValueError(f"s0 {self.s0}, s1 {self.s1}: N(k) would fall; allowed s0 <= s1 + 1")
        return self


class ConsistencyMethod(Method):
    """What every discrete-time consistency method in the EDM frame shares."""

    config: ConsistencyConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The student, from the teacher's weights if there is one."""
        return {"model": initial_network(kit, "edm", self.config)}

    def consistency(self, network: nn.Module) -> EDMConsistency:
        """``f`` around a network."""
        return EDMConsistency(network, self.sigma_data, self.config.sigma_min)

    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        """``f`` of the trained network, as it is sampled."""
        return self.consistency(nets["model"])

    def trained_consistency(self, network: nn.Module) -> EDMConsistency:
        """``f`` in training, where it is another than in sampling."""
        return self.consistency(network)

    def pair_outputs(
        self,
        nets: Nets,
        x: Tensor,
        sigma: Tensor,
        x_next: Tensor,
        sigma_next: Tensor,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Student at the larger noise level, target at the smaller one, under one dropout mask.

        The target network is ``nets["target"]``, or the student itself behind a stop-gradient.
        """
        randomness = RandomState.of(x.device)
        student = self.trained_consistency(nets["model"])(x, sigma, labels)
        target = self.trained_consistency(nets["target"] if "target" in nets else nets["model"])
        with torch.no_grad(), replayed(randomness):
            wanted = target(x_next, sigma_next, labels)
        return student, wanted

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """NFE 1 at ``sigma_max``; more by :func:`cmbench_plugins._sigmas.consistency_sigmas`."""
        c = self.config
        return multistep_plan(nfe, sigmas, sampler, sigma_max=c.sigma_max, published=c.mid_sigmas)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Algorithm 1."""
        return multistep_consistency(
            self.consistency_function(nets),
            noise,
            torch.tensor(plan.sigmas, dtype=torch.float64),
            sigma_min=self.renoising_sigma_min,
            labels=labels,
            noise_sampler=lambda step: draws.normal(f"step-{step}", noise),
            clip=self.config.clip_samples and self.data.bounded,
        )

    @property
    def renoising_sigma_min(self) -> float:
        """Noise level that an output has already: only the rest is added before the next step."""
        return self.config.sigma_min


class MetricConsistencyMethod(MetricMethod, ConsistencyMethod):
    """A consistency method whose distance can be chosen."""

    config: CMConfig


class CM(MetricConsistencyMethod):
    """Algorithms 2 and 3, which differ in the step to the smaller noise level, in N and in mu."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """Student and target; with mu = 0 the target is the student itself."""
        nets = super().build(kit)
        if self.has_target():
            nets["target"] = kit.network()
            nets["target"].load_state_dict(nets["model"].state_dict())
        return nets

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``d(f(x_{n+1}, t_{n+1}), f^-(x_n, t_n))`` for n uniform (lines 3 to 6)."""
        x0, c = batch.images, self.config
        sigmas = resident(
            karras_sigmas,
            self.n_points(progress),
            c.sigma_min,
            c.sigma_max,
            c.rho,
            like=x0,
            dtype=x0.dtype,
        )
        n = choose_uniformly(len(sigmas) - 1, draws.uniform("index", x0[:, 0, 0, 0]))
        smaller, larger = sigmas[n], sigmas[n + 1]
        z = draws.normal("noise", x0)
        x_larger = x0 + append_dims(larger, x0) * z
        x_smaller = self.step(x0, z, x_larger, larger, smaller, batch.labels)
        return self.distance(
            *self.pair_outputs(nets, x_larger, larger, x_smaller, smaller, batch.labels)
        )

    def after_step(self, nets: Nets, progress: Progress) -> None:
        """``theta^- <- mu theta^- + (1 - mu) theta`` (line 8)."""
        if "target" in nets:
            move_towards(nets["target"], nets["model"], 1 - self.target_decay(progress))

    def has_target(self) -> bool:
        """Say whether a target network of its own is needed."""
        raise NotImplementedError

    def n_points(self, progress: Progress) -> int:
        """N at this point of training."""
        raise NotImplementedError

    def target_decay(self, progress: Progress) -> float:
        """Mu at this point of training."""
        raise NotImplementedError

    def step(
        self,
        x0: Tensor,
        z: Tensor,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        """Go from ``(x, sigma)`` to the smaller noise level."""
        raise NotImplementedError


class CD(CM):
    """Algorithm 2: one step of the teacher's ODE."""

    Config = CDConfig
    config: CDConfig

    def has_target(self) -> bool:
        """Only for mu > 0."""
        return self.config.target_ema > 0

    def n_points(self, progress: Progress) -> int:
        """N is fixed."""
        return self.config.n_points

    def target_decay(self, progress: Progress) -> float:
        """Mu is fixed."""
        return self.config.target_ema

    def step(
        self,
        x0: Tensor,
        z: Tensor,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        """One Heun (or Euler) step of the PF-ODE with the frozen teacher."""
        denoise = self.distilled().denoise
        with torch.no_grad():
            if self.config.solver == "heun":
                return heun_step(denoise, x, sigma, sigma_next, labels)
            return ddim_step(x, denoise(x, sigma, labels), sigma, sigma_next)


class CT(CM):
    """Algorithm 3: the same noise at the smaller level, with curricula for N and mu."""

    Config = CTConfig
    config: CTConfig

    def has_target(self) -> bool:
        """Only for mu0 > 0."""
        return self.config.mu0 > 0

    def n_points(self, progress: Progress) -> int:
        """``N(k)`` (App. C)."""
        return sqrt_curriculum(
            progress.step, max(progress.total_steps, 1), self.config.s0, self.config.s1
        )

    def target_decay(self, progress: Progress) -> float:
        """``mu(k)`` (App. C)."""
        c = self.config
        return target_ema_decay(self.n_points(progress), c.s0, c.mu0, exponent=c.mu_exponent)

    def step(
        self,
        x0: Tensor,
        z: Tensor,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        """``x_n = x + t_n z``: an Euler step with the score estimated from ``x`` (Theorem 2)."""
        return x0 + append_dims(sigma_next, x0) * z
