"""CCT: continuous-time consistency models of 2023.

Song et al. 2023, arXiv:2303.01469, App. B: the pseudo-objectives of Theorem 5 (distillation) and
Theorem 6 (training). ``f . sg(df/dsigma)`` has the gradient of the consistency loss as its grid
becomes infinitely fine; its value means nothing. It must start from a diffusion model (the paper,
and the official code). One graded call that carries its tangent: 4 forward equivalents per step,
one more in the distillation form.

As released: noise levels with sigma^(1/rho) uniform, weight 1, a *sum* over values. The theorems'
Hessian of the metric is left out: for squared l2 and for pseudo-Huber it is a constant factor.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cmbench.diffusion.carried import boundary_consistency_tangent
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import power_sigmas
from cmbench.diffusion.tangent import image_norm, oracle_ode_slope, pseudo_objective
from cmbench.plugin.config import Positive
from cmbench.plugin.method import Batch, Draws, Nets, Progress
from cmbench_plugins.cm import ConsistencyConfig, ConsistencyMethod

__all__ = ["CCT", "CCTConfig"]


class CCTConfig(ConsistencyConfig):
    """Hyper-parameters of the continuous-time objectives."""

    rho: Positive = Field(7.0, description="exponent of the distribution of noise levels")
    form: Literal["training", "distillation"] = Field(
        "training", description="slope from data (Theorem 6) or from the teacher (Theorem 5)"
    )


class CCT(ConsistencyMethod):
    """Continuous-time consistency training and distillation."""

    Config = CCTConfig
    config: CCTConfig

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``f . sg(d_sigma f + (d_x f) slope)``; the slope points away from an origin."""
        c, x0 = self.config, batch.images
        u = draws.uniform("sigma", x0[:, 0, 0, 0])
        sigma = power_sigmas(u, c.sigma_min, c.sigma_max, c.rho)
        x_sigma = x0 + append_dims(sigma, x0) * draws.normal("noise", x0)
        slope = oracle_ode_slope(x_sigma, self.origin(x0, x_sigma, sigma, batch.labels), sigma)
        f, df = boundary_consistency_tangent(
            nets["model"].forward_with_tangent,
            x_sigma,
            sigma,
            slope,
            self.sigma_data,
            c.sigma_min,
            batch.labels,
        )
        progress.log("tangent_norm", image_norm(df, "rms"))
        return pseudo_objective(f, df, hessian=1.0)

    def origin(self, x0: Tensor, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """What the ODE's slope points away from: the image, or the teacher's denoised one."""
        if self.config.form == "training":
            return x0
        with torch.no_grad():
            return self.distilled().denoise(x_sigma, sigma, labels)
