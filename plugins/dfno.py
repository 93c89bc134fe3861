"""DSNO: whole trajectories of a diffusion model in one call, by a Fourier neural operator in time.

Zheng et al. 2023, arXiv:2211.13449 (first called DFNO), and its official code
(devzhk/DSNO-pytorch @0ffbfbb), whose files are named below: the paper's equation numbers could not
be checked. From unit noise ``z``, the solution at time 1, the network computes the states
``x(t_1) ... x(t_M)`` of the probability flow at fixed times at once ("parallel decoding", Fig. 1);
the last one, at time 0, is the sample. Blocks of a U-Net see each state by itself; after every
block a convolution over time with a kernel ``R`` in Fourier space mixes them
(:mod:`cmbench.networks.temporal`; models/layers.py).

Trajectories   before training a solver makes ``x(t_1) ... x(t_M)`` of the teacher from ``z``;
Times          cosine schedule, ``sigma = tan(pi t / 2)`` truncated at logsnr 20; the level at time
               1 is ``sigma_max``; states are variance-preserving, ``x_sigma / sqrt(1 + sigma^2)``
               (train_cifar.py);
Loss           ``mean over k of w_k d(G(z)(t_k), x(t_k))``, ``w = clamp(sqrt(SNR), 1, 10^4)``
               (utils/loss.py); neither the teacher nor data are used in it.

The network outputs states, not denoised images; it receives z and one noise label ``ln(sigma) / 4``
per state. A training step is one graded call (3 forward equivalents), of M times the arithmetic;
sampling is one call of M times the arithmetic. Published FIDs: CIFAR-10 3.78, ImageNet-64 7.83.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cmbench.diffusion.frames import cosine_time_to_sigma, edm_to_vp
from cmbench.diffusion.solvers import euler, float64_denoiser, heun
from cmbench.plugin.config import Positive
from cmbench.plugin.method import (
    Batch,
    Draws,
    GeneratedData,
    Kit,
    Nets,
    Phase,
    Progress,
    SamplingPlan,
)
from cmbench.training.resident import resident
from cmbench_plugins._distances import MetricConfig, MetricMethod
from cmbench_plugins._jumps import one_step_plan
from cmbench_plugins.edm import initial_network

__all__ = ["DFNO", "DFNOConfig"]

_SOLVERS = {"ddim": euler, "heun": heun}


class DFNOConfig(MetricConfig):
    """Hyper-parameters of DSNO."""

    metric: Literal["l2", "l1", "pseudo-huber", "lpips"] = Field(
        "l1", description="distance of a state from the trajectory's"
    )
    parameterization: Literal["edm", "x"] = Field(
        "edm", description="how the teacher reads its network; states are sigma_data F, or F for x"
    )
    times: tuple[float, ...] = Field(
        (0.5625, 0.25, 0.0625, 0.0),
        min_length=2,
        description="t_k: times of the states, descending from below 1 to 0",
    )
    temporal_modes: int = Field(
        2, ge=1, description="K: Fourier modes over time that are mixed, up to states / 2 + 1"
    )
    trajectories: int = Field(1_000_000, ge=1, description="trajectories that the teacher makes")
    trajectory_dtype: Literal["float16", "float32"] = Field(
        "float32", description="what the states are stored in"
    )
    solver: Literal["ddim", "heun"] = Field("ddim", description="how the teacher makes them")
    solver_steps: int = Field(
        512, ge=2, le=8192, description="steps of the solver, equal in time; times lie on them"
    )
    weight_max: Positive = Field(1e4, description="largest weight of a state")
    sigma_max: Positive = Field(80.0, description="noise level at time 1")
    clip_samples: bool = Field(
        True, description="clamp samples to [-1, 1], where the data lie there"
    )

    @field_validator("times")
    @classmethod
    def _descending(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if times[-1] != 0 or times[0] >= 1 or any(a <= b for a, b in pairwise(times)):
            raise ValueError("times descend from below 1 to 0")
        return times

    @model_validator(mode="after")
    def _on_the_grid(self) -> DFNOConfig:
        off = [t for t in self.times if not (t * self.solver_steps).is_integer()]
        if off:
            raise ValueError(f"times {off} are no multiples of 1 / solver_steps")
        if self.temporal_modes > len(self.times) // 2 + 1:
            raise ValueError(f"temporal_modes: allowed up to {len(self.times) // 2 + 1}")
        return self


class DFNO(MetricMethod):
    """A network of trajectories: all states from noise in one evaluation."""

    Config = DFNOConfig
    config: DFNOConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The network of all states, from the teacher's weights; their mixing starts near zero."""
        c = self.config
        states = {"states": len(c.times), "temporal_modes": c.temporal_modes}
        return {"model": initial_network(kit, c.parameterization, c, **states)}

    # ---- the teacher's trajectories ------------------------------------------------------------

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """One phase, on trajectories."""
        return [replace(phase, generated=self.trajectories()) for phase in super().phases(nets)]

    def trajectories(self) -> GeneratedData:
        """What the teacher is asked for."""
        c, times = self.config, ", ".join(f"{t:g}" for t in self.config.times)
        how = f"{c.solver}, {c.solver_steps} steps from sigma {c.sigma_max:g}, states at {times}"
        nfe = c.solver_steps if c.solver == "ddim" else 2 * c.solver_steps - 1
        return GeneratedData(
            c.trajectories, self.make, how, nfe, states=len(c.times), dtype=c.trajectory_dtype
        )

    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Return the teacher's states ``[N, M, C, H, W]`` from unit noise."""
        sigmas, index = self.fine_sigmas(), self.fine_index()
        denoise = float64_denoiser(self.distilled(), noise.dtype)
        x, states = sigmas[0] * noise.double(), []
        for start, end in pairwise(index):
            x = _SOLVERS[self.config.solver](denoise, x, sigmas[start : end + 1], labels=labels)
            states.append(edm_to_vp(x, sigmas[end])[0])
        return torch.stack(states, 1).to(noise.dtype)

    def fine_sigmas(self) -> Tensor:
        """The solver's noise levels, descending; the last one is zero."""
        steps = self.config.solver_steps
        grid = levels_at(tuple(1 - i / steps for i in range(steps + 1)), self.config.sigma_max)
        return torch.cat([grid[:-1], grid.new_zeros(1)])

    def fine_index(self) -> list[int]:
        """Where on the solver's grid the noise and the states lie."""
        steps = self.config.solver_steps
        return [0, *(round(steps * (1 - t)) for t in self.config.times)]

    # ---- the network of all states -------------------------------------------------------------

    def states(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        """``G(z)(t_1 ... t_M)``: states ``[N, M, C, H, W]`` of unit noise, in one evaluation."""
        c = self.config
        sigmas = resident(levels_at, c.times, c.sigma_max, like=noise, dtype=noise.dtype)
        c_noise = (sigmas.log() / 4).expand(len(noise), -1)
        states: Tensor = nets["model"](noise, c_noise, labels)
        return self.sigma_data * states if c.parameterization == "edm" else states

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``mean over k of w_k d(G(z)(t_k), x(t_k))``."""
        noise, target = batch.pair
        states = self.states(nets, noise, batch.labels)
        distances = self.distance(states.flatten(0, 1), target.flatten(0, 1))
        return self.weighted(distances.reshape(states.shape[:2]))

    def weighted(self, distances: Tensor) -> Tensor:
        """Return the weighted mean ``[N]`` of the states' distances ``[N, M]``."""
        c = self.config
        weights = resident(
            state_weights, c.times, c.sigma_max, c.weight_max, like=distances, dtype=distances.dtype
        )
        return (weights * distances).mean(1)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """One evaluation."""
        return one_step_plan("parallel decoding", self.config.sigma_max, nfe, sigmas, sampler)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """The last of the states, at time 0."""
        x = self.states(nets, noise, labels)[:, -1].contiguous()
        return x.clamp(-1, 1) if self.config.clip_samples and self.data.bounded else x


def levels_at(times: tuple[float, ...], sigma_max: float) -> Tensor:
    """Return the noise levels of times: ``sigma_max`` at 1, ``exp(-10)`` at 0; float64."""
    u = torch.tensor(times, dtype=torch.float64)
    return cosine_time_to_sigma(u, logsnr_min=-2 * math.log(sigma_max))


def state_weights(times: tuple[float, ...], sigma_max: float, weight_max: float) -> Tensor:
    """Return ``clamp(sqrt(SNR), 1, weight_max)`` of the states, float64."""
    return levels_at(times, sigma_max).reciprocal().clamp(1, weight_max)
