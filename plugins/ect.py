"""ECT: consistency models made easy ("easy consistency tuning").

Geng et al. 2024, arXiv:2406.14548, and its official code. Starts from a diffusion model and shrinks
the gap between the two noise levels in stages, from diffusion training (r = 0) to consistency
training. The target is the student behind a stop-gradient; both share noise and dropout mask. 4
forward equivalents per training step.

Training uses EDM's plain scalings (boundary at zero); the official sampler shifts the boundary to
0.003 and adds the full ``sigma z`` between steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.distances import pseudo_huber
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import lognormal_sigmas, shrinking_gap_time
from cmbench.diffusion.models import EDMConsistency
from cmbench.diffusion.weightings import edm_weight, inverse_gap_weight
from cmbench.plugin.config import NonNegative, Positive
from cmbench.plugin.method import Batch, Draws, Nets, Progress
from cmbench_plugins.cm import ConsistencyConfig, ConsistencyMethod

__all__ = ["ECT", "ECTConfig"]


class ECTConfig(ConsistencyConfig):
    """Hyper-parameters of ECT (official scripts)."""

    sigma_min: NonNegative = Field(0.003, description="boundary noise level in sampling only")
    clip_samples: bool = Field(False, description="clamp every output to [-1, 1] in sampling")
    p_mean: float = Field(-1.1, description="mean of ln t in training")
    p_std: Positive = Field(2.0, description="standard deviation of ln t in training")
    q: Positive = Field(2.0, description="factor by which the gap shrinks a stage")
    k: NonNegative = Field(8.0, description="n(t) = 1 + k sigmoid(-b t)")
    b: Positive = Field(1.0, description="n(t) = 1 + k sigmoid(-b t)")
    stages: int = Field(8, ge=1, description="stages of equal length")
    huber_c: NonNegative = Field(0.0, description="c of pseudo-Huber; 0 is the norm itself")
    weighting: Literal["inverse-gap", "edm"] = Field(
        "inverse-gap", description="1 / (t - r) (CIFAR-10), or EDM's weight (ImageNet)"
    )


class ECT(ConsistencyMethod):
    """Easy consistency tuning."""

    Config = ECTConfig
    config: ECTConfig

    def stage(self, progress: Progress) -> int:
        """Stage s at this point of training."""
        share = progress.nimg * self.config.stages // max(progress.total_nimg, 1)
        return min(int(share), self.config.stages - 1)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``w(t) (sqrt(||f_t - sg f_r||^2 + c^2) - c)``; the target is the image where r = 0."""
        c, x0 = self.config, batch.images
        t = lognormal_sigmas(draws.normal("sigma", x0[:, 0, 0, 0]), c.p_mean, c.p_std)
        r = shrinking_gap_time(t, self.stage(progress), c.q, c.k, c.b)
        z = draws.normal("noise", x0)
        x_t, x_r = x0 + append_dims(t, x0) * z, x0 + append_dims(r, x0) * z
        student, target = self.pair_outputs(nets, x_t, t, x_r, r, batch.labels)
        target = torch.where(append_dims(r, x0) > 0, target, x0)

        weight = (
            inverse_gap_weight(t, r)
            if c.weighting == "inverse-gap"
            else edm_weight(t, self.sigma_data)
        )
        return weight * pseudo_huber(student, target, c.huber_c)

    def trained_consistency(self, network: nn.Module) -> EDMConsistency:
        """EDM's scalings: the boundary is at zero noise."""
        return EDMConsistency(network, self.sigma_data, sigma_min=0.0)

    @property
    def renoising_sigma_min(self) -> float:
        """Between steps the full ``sigma z`` is added (official code)."""
        return 0.0
