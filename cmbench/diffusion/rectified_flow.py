"""Rectified flow: models that answer with its velocity, its times, and fixed-step solvers.

Liu et al. 2022 (arXiv:2209.03003) and Lee et al. 2024 (arXiv:2405.20320, "RF++"). The clock is the
first paper's: ``x_t = t x0 + (1 - t) eps``, time 0 is noise and 1 is data. RF++ runs it backwards;
its formulas are written here with ``1 - t``.

Shapes: images ``[N, C, H, W]``, times ``[N]``, labels int64 ``[N]`` or None; any float dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmbench.diffusion.frames import (
    append_dims,
    flow_time_to_sigma,
    predictions_to_velocity,
    sigma_to_flow_time,
    tiny,
    trig_to_edm,
)
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.preconditioning import RawNetwork
from cmbench.diffusion.runge_kutta import dormand_prince
from cmbench.diffusion.solvers import batch_sigma

#: ``v(x_t, t, labels) -> dx_t/dt``.
FlowVelocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: What the official DDPM++ receives at time 1.
TIME_SCALE = 999.0


@dataclass(frozen=True)
class FlowModel:
    """A raw network that is the velocity: ``v(x_t, t) = F(x_t, time_scale t)``.

    Its optimum for independent data and noise is ``(D(x_t / t, (1 - t) / t) - x_t) / (1 - t)``
    with the denoiser ``D`` (arXiv:2209.03003, Sec. 2.1), so it is a diffusion model too.
    """

    network: RawNetwork
    sigma_data: float
    time_scale: float = TIME_SCALE
    parameterization: ClassVar[str] = "flow"

    def flow_velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``dx_t/dt`` ``[N, C, H, W]`` at times ``t [N]`` in [0, 1]."""
        return self.network(x_t, self.time_scale * t, labels)

    def denoise(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the denoised images ``x_t + (1 - t) v`` of ``x_t = t x_sigma``."""
        return self._predictions(x_sigma, sigma, labels)[0]

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the velocity of the TrigFlow frame, at angles ``t [N]``."""
        denoised, epsilon = self._predictions(*trig_to_edm(x_t, t, self.sigma_data), labels)
        return predictions_to_velocity(t, denoised, epsilon, self.sigma_data)

    def _predictions(
        self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the predicted data and noise."""
        t = sigma_to_flow_time(sigma)
        wide = append_dims(t, x_sigma)
        x_t = wide * x_sigma
        v = self.flow_velocity(x_t, t, labels)
        return x_t + (1 - wide) * v, x_t - wide * v


@dataclass(frozen=True)
class EDMFlowModel(EDMModel):
    """A network with EDM's preconditioning, which also answers with the flow's velocity.

    ``v = (D(x_t / t, (1 - t) / t) - x_t) / (1 - t)`` (arXiv:2405.20320, Sec. 4) with EDM's scalings
    put in, so that nothing is divided by ``t`` or ``1 - t``: with ``w = (1 - t)^2 + t^2 sd^2``,
    ``v = (t sd^2 - (1 - t)) / w x_t + sd / sqrt(w) F(x_t / sqrt(w), ln((1 - t) / t) / 4)``.
    """

    def flow_velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``dx_t/dt`` ``[N, C, H, W]`` at times ``t [N]`` in (0, 1]."""
        c_noise = flow_time_to_sigma(t).clamp_min(tiny(t)).log() / 4
        wide, variance = append_dims(t, x_t), self.sigma_data**2
        w = (1 - wide) ** 2 + wide**2 * variance
        raw = self.network(x_t / w.sqrt(), c_noise, labels)
        return (wide * variance - (1 - wide)) / w * x_t + self.sigma_data / w.sqrt() * raw


# --- times of training -----------------------------------------------------------------------


def u_shaped_times(uniform: Tensor, a: float) -> Tensor:
    """Return times of the density ``a (e^(a t) + e^(a (1 - t))) / (2 (e^a - 1))`` on [0, 1].

    RF++ (arXiv:2405.20320, Sec. 4): most times near noise and near data. ``uniform [N]`` in [0, 1):
    its lower half draws ``t`` with density proportional to ``e^(a t)``, the upper half ``1 - t``.
    """
    twice = 2 * uniform
    rising = torch.log1p((twice % 1) * math.expm1(a)) / a
    return torch.where(twice < 1, rising, 1 - rising)


# --- solvers ---------------------------------------------------------------------------------


def float64_velocity(velocity: FlowVelocity, dtype: torch.dtype) -> FlowVelocity:
    """Return a velocity for states in float64; the network itself gets ``dtype``."""

    def wider(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return velocity(x.to(dtype), t.to(dtype), labels).double()

    return wider


def solve_flow(
    velocity: FlowVelocity,
    start: Tensor,
    times: Tensor,
    places: Tensor,
    *,
    labels: Tensor | None = None,
    heun: bool = False,
    first_noise: bool = False,
) -> Tensor:
    """Return images after steps along a flow, from ``places[0]`` to 1.

    Args:
        velocity: the flow, see :data:`FlowVelocity`; its calls are the NFE.
        start: the state ``[N, C, H, W]`` at ``places[0]``; it keeps its dtype.
        times: float64 ``[n]`` at which the network is asked.
        places: float64 ``[n]`` where the states are: ``times``, or what the official code of
            arXiv:2209.03003 has, which counts whole steps of ``1 / n`` from 0 although its network
            is asked at ``0.001 + 0.999 i / n``.
        labels: int64 ``[N]`` or None.
        heun: average the slope with that at the step's end, but for the last step: ``2 n - 1``
            evaluations. Otherwise Euler, ``n``.
        first_noise: place the predicted images on the line to the first state, not to the state
            that the flow is in ("new" sampler of RF++): the end of an Euler step is
            ``s x0 + (1 - s) start``.
    """

    def moved(x: Tensor, slope: Tensor, place: Tensor, following: Tensor) -> Tensor:
        if not first_noise:
            return x + (following - place) * slope
        return following * (x + (1 - place) * slope) + (1 - following) * start

    x, ends = start, torch.cat([places[1:], places.new_ones(1)])
    for step, (time, place, end) in enumerate(zip(times, places, ends, strict=True)):
        slope = velocity(x, batch_sigma(time, x), labels)
        if heun and step + 1 < len(times):
            guess = moved(x, slope, place, end)
            slope = (slope + velocity(guess, batch_sigma(times[step + 1], x), labels)) / 2
        x = moved(x, slope, place, end)
    return x


def solve_flow_adaptively(
    velocity: FlowVelocity,
    start: Tensor,
    time: float,
    *,
    labels: Tensor | None = None,
    tolerance: float = 1e-5,
    most: int | None = None,
) -> Tensor:
    """Return images by RK45 from ``time`` to 1, every image with steps of its own.

    Args:
        velocity: the flow, see :data:`FlowVelocity`.
        start: the state float64 ``[N, C, H, W]`` at ``time``.
        time: first time, above 0 for networks that do not know pure noise.
        labels: int64 ``[N]`` or None.
        tolerance: absolute and relative.
        most: evaluations per image, see :func:`~cmbench.diffusion.runge_kutta.dormand_prince`.
    """

    def field(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return velocity(x, t, None if labels is None else labels[rows])

    return dormand_prince(
        field, start, time, 1.0, rtol=tolerance, atol=tolerance, most_evaluations=most
    ).x
