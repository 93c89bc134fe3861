"""iCT: improved techniques for consistency training.

Song & Dhariwal 2023, arXiv:2310.14189. No teacher. The target is the student behind a stop-gradient
(mu = 0), the distance is pseudo-Huber on each image's vector norm, noise levels follow a discretised
lognormal, and the number of levels doubles in stages. 4 forward equivalents a training step.

There is no official code, and P_mean has been published with the wrong sign by a re-implementation:
it is -1.1.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.distances import huber_constant, pseudo_huber
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import (
    choose_bin,
    doubling_curriculum,
    karras_sigmas,
    lognormal_bin_probabilities,
)
from cmbench.diffusion.weightings import inverse_gap_weight
from cmbench.plugin.config import Positive
from cmbench.plugin.method import Batch, Draws, Kit, Nets, Progress
from cmbench_plugins.cm import CMConfig, ConsistencyMethod

__all__ = ["ICT", "ICTConfig"]


class ICTConfig(CMConfig):
    """Hyper-parameters of iCT (Table 1 of the paper)."""

    s0: int = Field(10, ge=1, description="noise-level intervals in the first stage")
    s1: int = Field(1280, ge=1, description="noise-level intervals in the last stage")
    p_mean: float = Field(-1.1, description="mean of ln sigma of the proposal")
    p_std: Positive = Field(2.0, description="standard deviation of ln sigma of the proposal")
    huber_c: Positive | None = Field(
        None, description="c of pseudo-Huber; 0.00054 sqrt(values of an image) if not given"
    )


class ICT(ConsistencyMethod):
    """Consistency training as improved."""

    Config = ICTConfig
    config: ICTConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """One network, from random weights unless a teacher is named."""
        return {"model": kit.student_of(kit.teacher) if kit.teacher else kit.network()}

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Pseudo-Huber, ``sqrt(||a - b||^2 + c^2) - c`` (Eq. 7)."""
        c = self.config.huber_c or huber_constant(a[0].numel())
        return pseudo_huber(a, b, c)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``lambda(sigma_i) d(f(x_{i+1}, sigma_{i+1}), sg f(x_i, sigma_i))``, i from ``p(i)``."""
        c, x0 = self.config, batch.images
        n_points = doubling_curriculum(progress.step, max(progress.total_steps, 1), c.s0, c.s1)
        sigmas = karras_sigmas(n_points, c.sigma_min, c.sigma_max, c.rho).to(x0.device)
        bins = lognormal_bin_probabilities(sigmas, c.p_mean, c.p_std)
        i = choose_bin(bins, draws.uniform("index", x0[:, 0, 0, 0]))
        smaller, larger = sigmas[i].to(x0), sigmas[i + 1].to(x0)
        z = draws.normal("noise", x0)
        student, target = self.pair_outputs(
            nets, nets["model"],
            x0 + append_dims(larger, x0) * z, larger,
            x0 + append_dims(smaller, x0) * z, smaller,
            batch.labels,
        )
        return inverse_gap_weight(larger, smaller) * self.distance(student, target)
