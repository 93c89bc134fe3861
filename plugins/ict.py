"""iCT: improved techniques for consistency training.

Song & Dhariwal 2023, arXiv:2310.14189. No teacher. The target is the student behind a
stop-gradient (mu = 0), the distance is pseudo-Huber on each image's vector norm, noise levels
follow a discretised lognormal, and the number of levels doubles in stages. 4 forward equivalents a
training step.

There is no official code, and P_mean has been published with the wrong sign by a re-implementation:
it is -1.1.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import (
    choose_bin,
    doubling_curriculum,
    karras_sigmas,
    lognormal_bin_probabilities,
)
from cmbench.diffusion.weightings import inverse_gap_weight
from cmbench.plugin.config import Positive
from cmbench.plugin.method import Batch, Draws, Nets, Progress
from cmbench.training.resident import resident
from cmbench_plugins.cm import CMConfig, MetricConsistencyMethod

__all__ = ["ICT", "ICTConfig"]


class ICTConfig(CMConfig):
    """Hyper-parameters of iCT (Table 1 of the paper)."""

    metric: Literal["l2", "l1", "pseudo-huber", "lpips"] = Field(
        "pseudo-huber", description="distance of the two outputs"
    )
    s0: int = Field(10, ge=1, description="noise-level intervals in the first stage")
    s1: int = Field(1280, ge=1, description="noise-level intervals in the last stage")
    noise_levels: Literal["lognormal", "uniform"] = Field(
        "lognormal", description="how intervals are chosen; uniform is CT's"
    )
    p_mean: float = Field(-1.1, description="mean of ln sigma of the lognormal")
    p_std: Positive = Field(2.0, description="standard deviation of ln sigma of the lognormal")

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.s0 > self.s1:
            raise ValueError(f"s0 {self.s0}, s1 {self.s1}: N(k) would fall; allowed s0 <= s1")
        return self


class ICT(MetricConsistencyMethod):
    """Consistency training as improved."""

    Config = ICTConfig
    config: ICTConfig

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``lambda(sigma_i) d(f(x_{i+1}, sigma_{i+1}), sg f(x_i, sigma_i))``, i from ``p(i)``."""
        c, x0 = self.config, batch.images
        n_points = doubling_curriculum(progress.step, max(progress.total_steps, 1), c.s0, c.s1)
        sigmas = resident(karras_sigmas, n_points, c.sigma_min, c.sigma_max, c.rho, like=x0)
        i = choose_bin(self.bin_probabilities(sigmas), draws.uniform("index", x0[:, 0, 0, 0]))
        smaller, larger = sigmas[i].to(x0), sigmas[i + 1].to(x0)
        z = draws.normal("noise", x0)
        student, target = self.pair_outputs(
            nets,
            x0 + append_dims(larger, x0) * z,
            larger,
            x0 + append_dims(smaller, x0) * z,
            smaller,
            batch.labels,
        )
        return inverse_gap_weight(larger, smaller) * self.distance(student, target)

    def bin_probabilities(self, sigmas: Tensor) -> Tensor:
        """``p(i)`` of the intervals of an ascending grid (Table 1)."""
        if self.config.noise_levels == "uniform":
            return torch.full_like(sigmas[1:], 1 / (len(sigmas) - 1))
        return lognormal_bin_probabilities(sigmas, self.config.p_mean, self.config.p_std)
