"""Single-step solvers of the PF-ODE around a denoiser (EDM frame).

Every solver is ``solver(denoise, x, sigmas, *, labels=None, noise_sampler=None) -> images``:

- ``denoise(x, sigma [N], labels)`` returns the denoised images; its calls are the NFE;
- ``x`` ``[N, C, H, W]`` is noise at ``sigmas[0]`` (unit noise times ``sigmas[0]``); the state keeps
  its dtype, float64 for EDM's accuracy;
- ``sigmas`` ``[n + 1]`` descend for ``n`` steps; a final 0 makes the last step return the denoised
  images (a first-order step). A CPU tensor saves synchronisation;
- ``noise_sampler(step)`` returns the unit noise of step 0 … n - 1, for stochastic solvers only.

With ``e = (x - D) / sigma`` the PF-ODE is ``dx/dsigma = e`` (Karras et al. 2022, arXiv:2206.00364,
Eq. 1 and 3). From ``sigma`` to ``s``: ``h = ln(sigma / s)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.models import DiffusionModel
from cmbench.errors import UserError

#: ``denoise(x [N,C,H,W], sigma [N], labels) -> denoised``.
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: ``noise_sampler(step) -> unit noise`` shaped as the state.
NoiseSampler = Callable[[int], Tensor]
#: What a solver extrapolates along a trajectory: the denoised images, or the noise.
Prediction = Literal["data", "noise"]


def float64_denoiser(model: DiffusionModel, dtype: torch.dtype) -> Denoiser:
    """Return ``model.denoise`` for a state in float64; the network itself gets ``dtype``."""

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return model.denoise(x.to(dtype), sigma.to(dtype), labels).double()

    return denoise


def batch_sigma(sigma: Tensor, x: Tensor) -> Tensor:
    """Return ``sigma`` (a scalar or ``[N]``) as ``[N]`` of ``x``'s dtype and device."""
    return sigma.to(device=x.device, dtype=x.dtype).expand(x.shape[0])


def ends_at_zero(sigmas: Tensor) -> bool:
    """Return whether the last noise level of a grid ``[n + 1]`` is zero."""
    return bool(sigmas[-1] == 0)


def log_steps(sigmas: Tensor) -> Tensor:
    """Return ``h_i = ln(sigma_i / sigma_{i+1})`` ``[n]``, infinite for a step to 0."""
    logs = sigmas.log()
    return logs[:-1] - logs[1:]


def check_order(who: str, what: str, order: int, lowest: int, highest: int) -> None:
    """Raise ``UserError`` unless an order, or what it counts, is within its range."""
    if not lowest <= order <= highest:
        raise UserError(
            who, f"{what} {order}", allowed=f"{lowest} to {highest}", remedy="choose one of these"
        )


# --- steps -----------------------------------------------------------------------------------


def ddim_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return ``(s/sigma) x + (1 - s/sigma) D``: DDIM, Euler and DPM-Solver-1 in one.

    Song et al. 2021 (arXiv:2010.02502), Eq. 12 at eta = 0, in the EDM frame. Noise levels are
    scalars or ``[N]``; ``s = 0`` returns the denoised images exactly.
    """
    ratio = append_dims(sigma_next / sigma, x)
    return ratio * x + (1 - ratio) * denoised


def as_prediction(prediction: Prediction, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return what a solver extrapolates, shaped as ``x``: ``D``, or ``e = (x - D) / sigma``."""
    return denoised if prediction == "data" else (x - denoised) / sigma


def linear_step(
    prediction: Prediction, x: Tensor, value: Tensor, sigma: Tensor, sigma_next: Tensor
) -> Tensor:
    """Return the state at ``s`` if ``value``, the denoised images or the noise, stays constant."""
    if prediction == "data":
        return ddim_step(x, value, sigma, sigma_next)
    return x + (sigma_next - sigma) * value


def analytic_denoised(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the ``D`` of ``e = x / sqrt(1 + sigma^2)``: the state, scaled to unit variance.

    At ``sigma_max`` the state is almost pure noise: the analytic first step of Dockhorn et al. 2022
    (arXiv:2210.05475) saves a network evaluation there.
    """
    return x - sigma * x / torch.sqrt(1 + sigma**2)


def two_step_target(
    first: Tensor, second: Tensor, sigma: Tensor, middle: Tensor, end: Tensor
) -> Tensor:
    """Return the ``D`` whose one DDIM step meets two of a teacher (arXiv:2202.00512, App. G).

    ``first`` and ``second`` are the predictions at ``sigma`` and ``middle``, images; levels are
    ``[N]``, ``sigma > middle >= end >= 0``. The two steps are inverted as one; x cancels and a mean
    of the predictions is left, which at ``end`` = 0 is the second, and at ``middle`` = ``end`` the
    first.
    """
    rest = torch.where(middle > end, 1 - end / middle, torch.zeros_like(middle))
    return torch.lerp(first, second, append_dims(rest / (1 - end / sigma), first))


def trigflow_ddim_step(x_t: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Return images ``cos(t - s) x_t - sin(t - s) sd F`` (arXiv:2410.11081, Eq. 26).

    The same point as :func:`ddim_step` in the other frame; times ``[N]``. The paper misprints an
    index.
    """
    gap = append_dims(t - t_next, x_t)
    return torch.cos(gap) * x_t - torch.sin(gap) * velocity


def heun_step(
    denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Return one Heun step, two evaluations, ``s > 0`` (Karras et al. 2022, Algorithm 1).

    Noise levels are scalars or ``[N]`` (a teacher's step of each image at its own level). Second
    order; not the Heun of third order.
    """
    wide, wide_next = append_dims(sigma, x), append_dims(sigma_next, x)
    slope = (x - denoise(x, batch_sigma(sigma, x), labels)) / wide
    guess = x + (wide_next - wide) * slope
    slope_next = (guess - denoise(guess, batch_sigma(sigma_next, x), labels)) / wide_next
    return x + (wide_next - wide) * (slope + slope_next) / 2


# --- Euler and Heun --------------------------------------------------------------------------


def euler(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Solve by Euler steps (DDIM): order 1, NFE = number of steps."""
    for sigma, sigma_next in pairwise(sigmas.unbind()):
        x = ddim_step(x, denoise(x, batch_sigma(sigma, x), labels), sigma, sigma_next)
    return x


def heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    leading_euler_steps: int = 0,
    trailing_euler_steps: int = 0,
) -> Tensor:
    """Solve by Heun steps: order 2, NFE = 2 n - 1 with a final 0, 2 n without.

    Karras et al. 2022, Algorithm 1. A step to 0 is an Euler step; so are ``leading_euler_steps`` at
    the start and ``trailing_euler_steps`` more before that last one, see :func:`heun_nfe`.
    """
    last = len(sigmas) - 2
    to_zero = ends_at_zero(sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.unbind())):
        if step < leading_euler_steps or step > last - to_zero - trailing_euler_steps:
            x = ddim_step(x, denoise(x, batch_sigma(sigma, x), labels), sigma, sigma_next)
        else:
            x = heun_step(denoise, x, sigma, sigma_next, labels)
    return x


@dataclass(frozen=True)
class HeunPlan:
    """How :func:`heun` spends an NFE budget on a grid of ``n_steps`` and a final 0."""

    n_steps: int
    leading_euler_steps: int
    trailing_euler_steps: int = 0

    @property
    def nfe(self) -> int:
        """Network evaluations of the plan."""
        return 2 * self.n_steps - 1 - self.leading_euler_steps - self.trailing_euler_steps

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments for :func:`heun`."""
        return {
            "leading_euler_steps": self.leading_euler_steps,
            "trailing_euler_steps": self.trailing_euler_steps,
        }


def heun_nfe(nfe: int, *, extra_euler: Literal["first", "last"] = "first") -> HeunPlan:
    """Return the plan that spends exactly ``nfe`` evaluations on Heun's method.

    Odd ``nfe = 2 n - 1`` is EDM's sampler of n steps, whose last step is Euler; 1 is a single
    denoising from ``sigma_max``. Even ``nfe`` takes ``nfe / 2 + 1`` steps, one more of which is an
    Euler step: the first, or with ``"last"`` the one before the step to 0. NFE 2 is two Euler
    steps.

    Below about ten evaluations Heun's step down to ``sigma_min`` overshoots (its second slope is
    ``(x - D) / sigma_min``), in EDM's own sampler too: ``"last"`` replaces just that step. On
    Gaussian mixtures it is the more accurate at every even budget.
    """
    if nfe < 1:
        raise UserError(
            "heun", f"NFE {nfe}", allowed="1 or more", remedy="ask for at least one evaluation"
        )
    if nfe % 2:
        return HeunPlan((nfe + 1) // 2, 0)
    first = extra_euler == "first"
    return HeunPlan(nfe // 2 + 1, int(first), int(not first))


def amed(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    ratios: Sequence[float],
    scales: Sequence[float],
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    analytic_first_step: bool = False,
) -> Tensor:
    """Solve by AMED steps: a slope between the ends of a step, scaled; two evaluations each.

    Zhou et al. 2023 (arXiv:2312.00094), Sec. 3. The slope is taken at ``s^r sigma^(1 - r)`` with
    ``r`` of ``ratios [n]``, and multiplied by ``scales [n]``; the paper's network predicts both.
    Ratio 1/2 and scale 1 is DPM-Solver-2. A step to 0 is an Euler step.
    """
    for step, (sigma, s) in enumerate(pairwise(sigmas.unbind())):
        if step == 0 and analytic_first_step:
            denoised = analytic_denoised(x, sigma)
        else:
            denoised = denoise(x, batch_sigma(sigma, x), labels)
        if s == 0:
            return ddim_step(x, denoised, sigma, s)
        middle = s ** ratios[step] * sigma ** (1 - ratios[step])
        between = ddim_step(x, denoised, sigma, middle)
        slope = (between - denoise(between, batch_sigma(middle, x), labels)) / middle
        x = x + scales[step] * (s - sigma) * slope
    return x


def stochastic_heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    s_churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.003,
) -> Tensor:
    """Solve by Heun steps after raising the noise level (Karras et al. 2022, Algorithm 2).

    The defaults are the paper's for ImageNet-64; ``s_churn = 0`` is :func:`heun`. NFE as there.
    """
    n_steps = len(sigmas) - 1
    to_zero = ends_at_zero(sigmas)
    gamma = min(s_churn / n_steps, math.sqrt(2) - 1)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.unbind())):
        if gamma > 0 and s_min <= float(sigma) <= s_max:
            raised = sigma * (1 + gamma)
            added = torch.sqrt(raised**2 - sigma**2) * s_noise
            x, sigma = x + added * required_noise("stochastic_heun", noise_sampler, step), raised
        if step == n_steps - 1 and to_zero:
            x = ddim_step(x, denoise(x, batch_sigma(sigma, x), labels), sigma, sigma_next)
        else:
            x = heun_step(denoise, x, sigma, sigma_next, labels)
    return x


def required_noise(who: str, noise_sampler: NoiseSampler | None, step: int) -> Tensor:
    """Return the unit noise of a step, shaped as the state; UserError without a sampler."""
    if noise_sampler is None:
        raise UserError(
            who,
            "no noise_sampler was given, but a step adds noise",
            allowed="a function from the step to unit noise",
            remedy="pass noise_sampler, or choose a sampler without noise",
        )
    return noise_sampler(step)


def euler_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Solve by ancestral steps: down to ``s^2 / sigma``, then noise up to ``s``; NFE = steps.

    DDIM at eta = 1 (arXiv:2010.02502, Eq. 16): ``sigma_up^2 = s^2 (sigma^2 - s^2) / sigma^2``. No
    noise in a step to 0.
    """
    last = len(sigmas) - 2
    to_zero = ends_at_zero(sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.unbind())):
        denoised = denoise(x, batch_sigma(sigma, x), labels)
        x = ddim_step(x, denoised, sigma, sigma_next**2 / sigma)
        if not (step == last and to_zero):
            up = sigma_next * torch.sqrt((sigma**2 - sigma_next**2).clamp_min(0)) / sigma
            x = x + up * required_noise("euler_ancestral", noise_sampler, step)
    return x
