"""sCM: simplified, stabilised continuous-time consistency models (sCT and sCD).

Lu & Song 2024, "Simplifying, Stabilizing & Scaling Continuous-Time Consistency Models",
arXiv:2410.11081, Algorithm 1. Starts from a diffusion model (TrigFlow, ``c_noise = t``); the target
network is the student itself behind a stop-gradient. sCT takes the trajectory's slope from data and
noise, sCD from the teacher. A training step is one graded call that carries its tangent along: 4
forward equivalents against 3 of diffusion training; sCD adds one call of the teacher.

Two choices of the paper's comparisons are here as well: ``n_points`` replaces the tangent by the
discrete one on that many noise levels (Sec. 5.3), ``parameterization = "edm"`` reads the network
as one that was trained with EDM's preconditioning and receives ``ln(sigma) / 4``.

With ``guidance``, sCD distils its teacher under classifier-free guidance (App. G, ImageNet-512): a
strength is drawn per image and given to the student as a condition; the teacher is called twice.

Not to confuse with SCT ("stable consistency tuning", arXiv:2410.18958).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from cmbench.diffusion.consistency_sampling import multistep_trigflow
from cmbench.diffusion.frames import append_dims, sigma_to_t, t_to_sigma, velocity_to_denoised
from cmbench.diffusion.grids import (
    choose_bin,
    karras_sigmas,
    lognormal_bin_probabilities,
    lognormal_times,
)
from cmbench.diffusion.models import TrigFlowConsistency, TrigFlowModel
from cmbench.diffusion.solvers import trigflow_ddim_step
from cmbench.diffusion.tangent import (
    clip_tangent,
    discrete_tangent,
    image_norm,
    jvp_inputs,
    normalize_tangent,
    rearranged_tangent,
    trigflow_interpolate,
    trigflow_velocity_target,
    warmup,
)
from cmbench.diffusion.weightings import adaptive_weighted_loss
from cmbench.networks.heads import LogVarianceHead
from cmbench.plugin.config import MethodConfig, Positive
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
from cmbench_plugins._guidance import (
    GUIDANCE,
    Conditions,
    GuidanceConfig,
    given,
    guided_velocity,
    require_guidable,
)
from cmbench_plugins._sigmas import multistep_plan
from cmbench_plugins.edm import initial_network

__all__ = ["SCD", "SCT", "SCDConfig", "SCMConfig"]

#: What a network receives as time, and the sign of its output as TrigFlow's F (App. B.1).
_AS_TRIGFLOW: dict[str, tuple[Literal["t", "log-sigma"], float]] = {
    "trigflow": ("t", 1.0),
    "edm": ("log-sigma", -1.0),
}


class Ends(NamedTuple):
    """Data, noise and classes of the images whose trajectories are followed."""

    x0: Tensor
    z: Tensor
    labels: Tensor | None


class SCMConfig(MethodConfig):
    """Hyper-parameters of sCM (App. G); sCT and sCD share them."""

    parameterization: Literal["trigflow", "edm"] = Field(
        "trigflow",
        description="as the teacher's: TrigFlow's F with c_noise = t, or EDM's F with "
        "c_noise = ln(sigma) / 4",
    )
    p_mean: float = Field(-1.0, description="mean of ln sigma in training")
    p_std: Positive = Field(1.4, description="standard deviation of ln sigma in training")
    tangent: Literal["normalize", "clip", "raw"] = Field(
        "normalize", description="how the tangent's variance over data is bounded (Sec. 4.2)"
    )
    tangent_c: Positive = Field(0.1, description="c of g / (||g|| + c)")
    tangent_norm: Literal["l2", "rms"] = Field(
        "l2", description="norm over an image: of the vector, or per value; the paper leaves open"
    )
    warmup_steps: int = Field(10_000, ge=0, description="H: steps over which r rises to 1")
    adaptive_weighting: bool = Field(True, description="learn the weight w(t) (Eq. 8)")
    tangent_mode: Literal["carried", "forward-ad", "finite-difference"] = Field(
        "carried", description="how the derivative along the trajectory is computed"
    )
    tangent_dtype: Literal["autocast", "fp32"] = Field(
        "autocast", description="precision of the carried derivative: as the activations', or full"
    )
    n_points: int | None = Field(
        None, ge=2, description="noise levels of the discrete tangent; continuous if not given"
    )
    sigma_max: Positive = Field(80.0, description="noise level that sampling starts from")
    mid_times: tuple[float, ...] = Field(
        (1.1,), description="TrigFlow times of the steps after the first (App. G.5)"
    )


class SCDConfig(SCMConfig):
    """Hyper-parameters of sCD."""

    guidance: GuidanceConfig | None = Field(
        None,
        description="guidance of the teacher that is distilled; needs a conditional recipe and "
        "network.conditions = ['guidance']; none if not given",
    )

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``guidance`` out where there is none: recipes without it keep their hash."""
        table: dict[str, Any] = handler(self)
        if self.guidance is None:
            table.pop("guidance", None)
        return table


class SCT(Method):
    """Algorithm 1 with the trajectory's slope from data and noise."""

    Config = SCMConfig
    config: SCMConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The student starts from the teacher's averaged weights, sCT's too (App. A)."""
        nets = {"model": initial_network(kit, self.config.parameterization, self.config)}
        if self.config.adaptive_weighting:
            nets["weight"] = LogVarianceHead()
        return nets

    def trained_modules(self, nets: Nets) -> tuple[str, ...]:
        """The network and the adaptive weight learn together."""
        return tuple(nets)

    def told(self, draws: Draws, like: Tensor) -> Conditions:
        """Return what the network receives beside the time, ``[N]`` by name: nothing."""
        return {}

    def slope(self, x_t: Tensor, t: Tensor, ends: Ends, told: Conditions) -> Tensor:
        """``dx_t/dt`` (line 5): for training, the conditional velocity ``cos t z - sin t x0``."""
        return trigflow_velocity_target(ends.x0, ends.z, t)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """Algorithm 1, lines 3 to 10."""
        c, sd, x0 = self.config, self.sigma_data, batch.images
        z = sd * draws.normal("noise", x0)
        t, s = self.times(draws, x0[:, 0, 0, 0])
        x_t = trigflow_interpolate(x0, z, t)
        told = self.told(draws, t)
        dx_dt = self.slope(x_t, t, Ends(x0, z, batch.labels), told)

        r = warmup(progress.step, c.warmup_steps)
        if s is None:
            F, g = self.tangent(nets["model"], x_t, t, dx_dt, r, batch.labels, told)
        else:
            F, g = self.discrete(nets["model"], x_t, t, s, dx_dt, r, batch.labels, told)
        self.log_tangent(progress, g, t)
        g = self.bounded(g)

        error = (F - F.detach() - g).square().flatten(1).sum(1)
        w = nets["weight"](t) if c.adaptive_weighting else torch.zeros_like(t)
        return adaptive_weighted_loss(error, w, x0[0].numel())

    def times(self, draws: Draws, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``t`` (line 3), and the next smaller time where the tangent is discrete."""
        c = self.config
        if c.n_points is None:
            normal = draws.normal("time", like)
            return lognormal_times(normal, c.p_mean, c.p_std, self.sigma_data), None
        bins = resident(self.bin_probabilities, like=like)
        i = choose_bin(bins, draws.uniform("time", like))
        times = resident(self.discrete_times, like=like, dtype=like.dtype)
        return times[i + 1], times[i]

    def discrete_grid(self) -> Tensor:
        """Return the ascending noise levels of the discrete tangent, float64 on the CPU."""
        assert self.config.n_points is not None
        return karras_sigmas(self.config.n_points, sigma_max=self.config.sigma_max)

    def bin_probabilities(self) -> Tensor:
        """Return the probability of each interval of the grid."""
        c = self.config
        return lognormal_bin_probabilities(self.discrete_grid(), c.p_mean, c.p_std)

    def discrete_times(self) -> Tensor:
        """Return the grid in TrigFlow's time."""
        return sigma_to_t(self.discrete_grid(), self.sigma_data)

    def tangent(
        self,
        network: Any,
        x_t: Tensor,
        t: Tensor,
        dx_dt: Tensor,
        r: float,
        labels: Tensor | None,
        told: Conditions,
    ) -> tuple[Tensor, Tensor]:
        """Return ``F`` (graded) and ``g = cos t df^-/dt`` (lines 7 and 8), warmed up to ``r``."""
        c, sd = self.config, self.sigma_data
        embedding, sign = _AS_TRIGFLOW[c.parameterization]
        inputs = jvp_inputs(t, dx_dt, x_t, sd, noise_embedding=embedding)
        dtype = torch.float32 if c.tangent_dtype == "fp32" else None
        raw, d_raw = network.forward_with_tangent(
            *inputs, labels, mode=c.tangent_mode, tangent_dtype=dtype, **given(told)
        )
        F, dF = sign * raw, sign * d_raw
        return F, rearranged_tangent(F.detach(), dF, x_t, dx_dt, t, r, sd)

    def discrete(
        self,
        network: Any,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        dx_dt: Tensor,
        r: float,
        labels: Tensor | None,
        told: Conditions,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`tangent`, by the difference of two outputs, one DDIM step apart (Sec. 5.3)."""
        sd, read_as = self.sigma_data, _AS_TRIGFLOW[self.config.parameterization]
        randomness = RandomState.of(x_t.device)
        F = TrigFlowModel(network, sd, *read_as).raw(x_t, t, labels, **given(told))
        with torch.no_grad(), replayed(randomness):
            x_s = trigflow_ddim_step(x_t, dx_dt, t, s)
            f_s = TrigFlowConsistency(network, sd, *read_as)(x_s, s, labels, **given(told))
            f_t = velocity_to_denoised(x_t, t, sd * F)
            cosine = append_dims(torch.cos(t), x_t)
            full = cosine * discrete_tangent(f_t, f_s, t, s)
            # g is linear in r; at r = 0 it has no derivative in it.
            start = -(cosine**2) * (sd * F - dx_dt)
            return F, start + r * (full - start)

    def bounded(self, g: Tensor) -> Tensor:
        """Tangent normalisation or clipping (line 9)."""
        if self.config.tangent == "normalize":
            return normalize_tangent(g, self.config.tangent_c, self.config.tangent_norm)
        return clip_tangent(g) if self.config.tangent == "clip" else g

    def log_tangent(self, progress: Progress, g: Tensor, t: Tensor) -> None:
        """Log the tangent's size before it is bounded, over all and by thirds of ``[0, pi/2]``."""
        norm = image_norm(g, "rms")
        progress.log("tangent_norm", norm)
        third = (t * (6 / torch.pi)).long().clamp(0, 2)
        for index, name in enumerate(("small_t", "middle_t", "large_t")):
            here = (third == index).to(norm)
            progress.log(f"tangent_norm_{name}", (norm * here).sum() / here.sum().clamp_min(1))

    def told_in_sampling(self, images: Tensor) -> Conditions:
        """Return what the network receives beside the time for ``images`` ``[N, C, H, W]``."""
        return {}

    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        """``f`` of the trained network: TrigFlow's denoiser at the same F, in EDM's frame."""
        read_as = _AS_TRIGFLOW[self.config.parameterization]
        model = TrigFlowModel(nets["model"], self.sigma_data, *read_as)

        def f(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return model.denoise(x, sigma, labels, **given(self.told_in_sampling(x)))

        return f

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """``t_max = arctan(sigma_max / sd)``, then the times of the paper, then the common rule."""
        mid = t_to_sigma(torch.tensor(self.config.mid_times, dtype=torch.float64), self.sigma_data)
        return multistep_plan(
            nfe, sigmas, sampler, sigma_max=self.config.sigma_max, published=tuple(mid.tolist())
        )

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Denoise, add noise, denoise again (Sec. 2.1)."""
        sigmas = torch.tensor(plan.sigmas, dtype=torch.float64)
        read_as = _AS_TRIGFLOW[self.config.parameterization]
        f = TrigFlowConsistency(nets["model"], self.sigma_data, *read_as)
        return multistep_trigflow(
            partial(f, **given(self.told_in_sampling(noise))),
            noise,
            sigma_to_t(sigmas, self.sigma_data),
            self.sigma_data,
            labels,
            lambda step: draws.normal(f"step-{step}", noise),
        )


class SCD(SCT):
    """Algorithm 1 with the trajectory's slope from the teacher, ``dx_t/dt = sd F_teacher``."""

    Config = SCDConfig
    config: SCDConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """As sCT's; the teacher also drives training.

        Raises:
            UserError: guidance without classes, or without the network's condition.
        """
        require_guidable(self.config, self.config.guidance)
        return super().build(kit)

    def told(self, draws: Draws, like: Tensor) -> Conditions:
        """Return the strength of guidance, uniform between its bounds, where there is guidance."""
        g = self.config.guidance
        return {} if g is None else g.drawn(draws, like)

    def told_in_sampling(self, images: Tensor) -> Conditions:
        """Return the strength that the recipe samples with, where there is guidance."""
        g = self.config.guidance
        return {} if g is None else {GUIDANCE: images.new_full((len(images),), g.sampled)}

    def slope(self, x_t: Tensor, t: Tensor, ends: Ends, told: Conditions) -> Tensor:
        """``dx_t/dt`` of the teacher's PF-ODE (line 5, distillation), guided where asked."""
        with torch.no_grad():
            return guided_velocity(self.distilled(), x_t, t, ends.labels, told)
