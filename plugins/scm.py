"""sCM: simplified, stabilised continuous-time consistency models (sCT and sCD).

Lu & Song 2024, "Simplifying, Stabilizing & Scaling Continuous-Time Consistency Models",
arXiv:2410.11081, Algorithm 1. Starts from a diffusion model (TrigFlow, ``c_noise = t``); the target
network is the student itself behind a stop-gradient. sCT takes the trajectory's slope from data and
noise, sCD from the teacher. A training step is one graded call that carries its tangent along: 4
forward equivalents against 3 of diffusion training; sCD adds one call of the teacher.

Not to confuse with SCT ("stable consistency tuning", arXiv:2410.18958).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.consistency_sampling import multistep_trigflow
from cmbench.diffusion.frames import sigma_to_t, t_to_sigma
from cmbench.diffusion.grids import lognormal_times
from cmbench.diffusion.models import TrigFlowConsistency
from cmbench.diffusion.tangent import (
    clip_tangent,
    image_norm,
    jvp_inputs,
    normalize_tangent,
    rearranged_tangent,
    trigflow_interpolate,
    trigflow_velocity_target,
    warmup,
)
from cmbench.diffusion.weightings import adaptive_weighted_loss
from cmbench.errors import Declined, UserError
from cmbench.networks.heads import LogVarianceHead
from cmbench.plugin.config import MethodConfig, NonNegative, Positive
from cmbench.plugin.method import Batch, Draws, Kit, Method, Nets, Progress, SamplingPlan
from cmbench_plugins._times import consistency_sigmas

__all__ = ["SCD", "SCT", "SCMConfig"]


class SCMConfig(MethodConfig):
    """Hyper-parameters of sCM (App. G); sCT and sCD share them."""

    p_mean: float = Field(-1.0, description="mean of ln sigma in training")
    p_std: Positive = Field(1.4, description="standard deviation of ln sigma in training")
    tangent: Literal["normalize", "clip", "raw"] = Field(
        "normalize", description="how the tangent's variance over data is bounded (Sec. 4.2)"
    )
    tangent_c: Positive = Field(0.1, description="c of g / (||g|| + c)")
    tangent_norm: Literal["l2", "rms"] = Field(
        "l2", description="norm over an image: of the vector, or per value; the paper leaves it open"
    )
    warmup_steps: NonNegative = Field(10_000, description="H: steps over which r rises to 1")
    adaptive_weighting: bool = Field(True, description="learn the weight w(t) (Eq. 8)")
    tangent_mode: Literal["carried", "forward-ad", "finite-difference"] = Field(
        "carried", description="how the derivative along the trajectory is computed"
    )
    sigma_max: Positive = Field(80.0, description="noise level that sampling starts from")
    mid_times: tuple[float, ...] = Field(
        (1.1,), description="TrigFlow times of the steps after the first (App. G.5)"
    )


class SCT(Method):
    """Algorithm 1 with the trajectory's slope from data and noise."""

    Config = SCMConfig
    config: SCMConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The student starts from the teacher's averaged weights, sCT's too (App. A)."""
        model = kit.student_of(kit.teacher) if kit.teacher else kit.network()
        return {"model": model, "weight": LogVarianceHead()}

    def trained_modules(self, nets: Nets) -> tuple[str, ...]:
        """The network and the adaptive weight learn together."""
        return ("model", "weight")

    def slope(self, x_t: Tensor, t: Tensor, x0: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        """``dx_t/dt`` (line 5): for training, the conditional velocity ``cos t z - sin t x0``."""
        return trigflow_velocity_target(x0, z, t)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """Algorithm 1, lines 3 to 10."""
        c, sd, x0 = self.config, self.sigma_data, batch.images
        z = sd * draws.normal("noise", x0)
        t = lognormal_times(draws.normal("time", x0[:, 0, 0, 0]), c.p_mean, c.p_std, sd)
        x_t = trigflow_interpolate(x0, z, t)
        dx_dt = self.slope(x_t, t, x0, z, batch.labels)

        r = warmup(progress.step, round(c.warmup_steps))
        inputs = jvp_inputs(t, dx_dt, x_t, sd)
        F, dF = nets["model"].forward_with_tangent(*inputs, batch.labels, mode=c.tangent_mode)
        F_minus = F.detach()
        g = rearranged_tangent(F_minus, dF, x_t, dx_dt, t, r, sd)
        progress.log("tangent_norm", image_norm(g, "rms"))
        g = self.bounded(g)

        error = (F - F_minus - g).square().flatten(1).sum(1)
        w = nets["weight"](t) if c.adaptive_weighting else torch.zeros_like(t)
        return adaptive_weighted_loss(error, w, x0[0].numel())

    def bounded(self, g: Tensor) -> Tensor:
        """Tangent normalisation or clipping (line 9)."""
        if self.config.tangent == "normalize":
            return normalize_tangent(g, self.config.tangent_c, self.config.tangent_norm)
        return clip_tangent(g) if self.config.tangent == "clip" else g

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """``t_max``, then the times of the paper; beyond them, times halve the noise level's log.

        NFE 1 is one evaluation at ``t_max = arctan(sigma_max / sd)``.
        """
        if sigmas is None:
            sigmas = self.default_sigmas(nfe)
        if len(sigmas) != nfe:
            raise Declined(f"NFE {nfe} takes {nfe} noise levels, got {len(sigmas)}")
        return SamplingPlan(nfe, "multistep", tuple(sigmas))

    def default_sigmas(self, nfe: int) -> tuple[float, ...]:
        """Return ``sigma_max`` and the noise levels of the later steps, descending."""
        mid = t_to_sigma(torch.tensor(self.config.mid_times, dtype=torch.float64), self.sigma_data)
        return consistency_sigmas(nfe, self.config.sigma_max, tuple(mid.tolist()))

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Denoise, add noise, denoise again (Sec. 2.1)."""
        sigmas = torch.tensor(plan.sigmas, dtype=torch.float64)
        times = sigma_to_t(sigmas, self.sigma_data).to(noise)
        consistency = TrigFlowConsistency(nets["model"], self.sigma_data)
        return multistep_trigflow(
            consistency, noise, times, self.sigma_data, labels,
            lambda step: draws.normal(f"step-{step}", noise),
        )


class SCD(SCT):
    """Algorithm 1 with the trajectory's slope from the teacher, ``dx_t/dt = sd F_teacher``."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """As sCT's; the teacher also drives training."""
        self.teacher = kit.teacher
        return super().build(kit)

    def slope(self, x_t: Tensor, t: Tensor, x0: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        """``dx_t/dt`` of the teacher's PF-ODE (line 5, distillation)."""
        if self.teacher is None:
            raise UserError("method SCD", "has no teacher", allowed="METHOD:RECIPE or analytic",
                            remedy="set teacher in the recipe")
        with torch.no_grad():
            return self.teacher.model.velocity(x_t, t, labels)
