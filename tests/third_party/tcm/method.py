"""Truncated consistency models: a second stage for the upper noise levels (arXiv:2410.14895).

Stage 1 is easy consistency tuning. Stage 2 keeps its result for levels below ``sigma_split`` and
trains a copy of it above; images at the boundary tie both together.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.distances import pseudo_huber
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import lognormal_sigmas, shrinking_gap_time
from cmbench.diffusion.models import EDMConsistency
from cmbench.plugin.config import Fraction, MethodConfig, NonNegative, Positive
from cmbench.plugin.method import (
    Batch,
    ConsistencyFunction,
    Draws,
    Kit,
    Method,
    Nets,
    Phase,
    PhaseStart,
    Progress,
)


class TCMConfig(MethodConfig):
    huber_c: NonNegative = Field(1e-8, description="c of pseudo-Huber")
    sigma_split: Positive = Field(1.0, description="lowest level that stage 2 trains")
    boundary_share: Fraction = Field(0.25, description="share of images at sigma_split")
    boundary_weight: Positive = Field(0.1, description="weight of their mean loss")


class TCM(Method):
    Config = TCMConfig
    config: TCMConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": kit.student("edm"), "early": kit.student("edm")}

    def sampled_modules(self, nets: Nets) -> tuple[str, ...]:
        return ("model", "early")

    def phases(self, nets: Nets) -> Sequence[Phase]:
        (stage,) = super().phases(nets)
        (first,) = self.objectives(nets)
        second = replace(first, loss=self.upper_loss)
        return [stage, replace(stage, name="upper", objectives=(second,), start=self.split)]

    def split(self, start: PhaseStart) -> None:
        for name in ("model", "early"):
            start[name].load_state_dict(start.averaged("model"))

    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        def f(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            out, above = torch.empty_like(x), sigma >= self.config.sigma_split
            for name, here in (("model", above), ("early", ~above)):
                if here.any():
                    told = None if labels is None else labels[here]
                    one = EDMConsistency(nets[name], self.sigma_data, 0.0)
                    out[here] = one(x[here], sigma[here], told)
            return out

        return f

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        normal = draws.normal("sigma", batch.images[:, 0, 0, 0])
        alone = {**nets, "early": nets["model"]}
        return self.pair_loss(alone, lognormal_sigmas(normal, -1.1, 2.0), batch, draws, progress)

    def upper_loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """Levels of a Student t in ln sigma, in its limit of no degrees of freedom."""
        c, uniform = self.config, draws.uniform("sigma", batch.images[:, 0, 0, 0])
        sigma = torch.exp(0.02 * torch.sinh(math.asinh(math.log(80.0) / 0.02) * uniform))
        at_split = draws.uniform("boundary", sigma) < c.boundary_share
        sigma = c.sigma_split * torch.where(at_split, torch.ones_like(sigma), sigma)
        loss = self.pair_loss(nets, sigma, batch, draws, progress)
        weights = (c.boundary_weight / c.boundary_share, 1 / (1 - c.boundary_share))
        return torch.where(at_split, weights[0] * loss, weights[1] * loss)

    def pair_loss(
        self, nets: Nets, t: Tensor, batch: Batch, draws: Draws, progress: Progress
    ) -> Tensor:
        f, x0, noise = (
            self.consistency_function(nets),
            batch.images,
            draws.normal("z", batch.images),
        )
        r = shrinking_gap_time(t, 8 * progress.nimg // max(progress.total_nimg, 1)).clamp_min(1e-6)
        with torch.no_grad():
            target = f(x0 + append_dims(r, x0) * noise, r, batch.labels)
        out = f(x0 + append_dims(t, x0) * noise, t, batch.labels)
        return pseudo_huber(out, target, self.config.huber_c) / (t - r)

    def sampling_levels(self, nfe: int) -> list[float]:
        return [80.0 / 100.0 ** (i / max(nfe - 1, 1)) for i in range(nfe)]
