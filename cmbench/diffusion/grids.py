"""Noise-level grids, curricula and proposal distributions.

Grids are float64 and ascending unless named ``sampling_*`` (descending, as solvers take them).
Defaults are EDM's: ``sigma_min`` 0.002, ``sigma_max`` 80, ``rho`` 7. Curricula take and return
Python numbers; proposals map given randomness, so that a seeded caller decides every draw.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cmbench.diffusion.frames import sigma_to_t, sigma_to_vp_time, vp_time_to_sigma
from cmbench.errors import UserError

SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
RHO = 7.0


def _check_grid(who: str, count: int, sigma_min: float, sigma_max: float, lowest: float) -> None:
    if count < 1:
        raise UserError(
            who, f"{count} points or steps", allowed="1 or more", remedy="ask for at least one"
        )
    if not (lowest <= sigma_min < sigma_max < math.inf):
        raise UserError(
            who,
            f"sigma_min {sigma_min:g}, sigma_max {sigma_max:g}",
            allowed=f"{lowest:g} <= sigma_min < sigma_max",
            remedy="correct the range of noise levels",
        )


def _with_exact_ends(grid: Tensor, first: float, last: float) -> Tensor:
    """Overwrite the ends, which the power and the logarithm return only up to rounding."""
    return torch.cat([grid.new_tensor([first]), grid[1:-1], grid.new_tensor([last])])


# --- grids -----------------------------------------------------------------------------------


def karras_sigmas(
    n_points: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Return ``n_points`` ascending noise levels, uniform in ``sigma^(1/rho)`` ``[n_points]``.

    Karras et al. 2022 (arXiv:2206.00364), Eq. 5, reversed; index 0 is exactly ``sigma_min`` and
    the last exactly ``sigma_max``. One point is ``sigma_max``: the published formula divides by
    zero there. ``sigma_min = 0`` is allowed.
    """
    _check_grid("karras_sigmas", n_points, sigma_min, sigma_max, 0.0)
    if n_points == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    ramp = torch.linspace(0, 1, n_points, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _with_exact_ends((low + ramp * (high - low)) ** rho, sigma_min, sigma_max)


def log_sigmas(n_points: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """Return ``n_points`` ascending noise levels, uniform in ``lambda = -ln sigma``.

    Lu et al. 2022 (arXiv:2206.00927), Sec. 3.4. One point is ``sigma_max``; ``sigma_min`` > 0.
    """
    _check_grid("log_sigmas", n_points, sigma_min, sigma_max, math.ulp(0.0))
    if n_points == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    low, high = math.log(sigma_min), math.log(sigma_max)
    grid = torch.linspace(low, high, n_points, dtype=torch.float64).exp()
    return _with_exact_ends(grid, sigma_min, sigma_max)


def vp_time_sigmas(
    n_points: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, power: float = 2.0
) -> Tensor:
    """Return ``n_points`` ascending noise levels, uniform in ``tau^(1/power)`` of VP time.

    Zhang & Chen 2022 (arXiv:2204.13902) release ``power = 2``. One point is ``sigma_max``.
    """
    _check_grid("vp_time_sigmas", n_points, sigma_min, sigma_max, math.ulp(0.0))
    if n_points == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
    low, high = sigma_to_vp_time(ends) ** (1 / power)
    ramp = torch.linspace(0, 1, n_points, dtype=torch.float64)
    grid = vp_time_to_sigma((low + ramp * (high - low)) ** power)
    return _with_exact_ends(grid, sigma_min, sigma_max)


def sampling_sigmas(
    n_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Return ``n_steps + 1`` descending noise levels: the Karras grid, then 0.

    Karras et al. 2022, Eq. 5; one step is ``[sigma_max, 0]``.
    """
    grid = karras_sigmas(n_steps, sigma_min, sigma_max, rho).flip(0)
    return torch.cat([grid, grid.new_zeros(1)])


def sampling_karras_sigmas(
    n_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Return ``n_steps + 1`` descending noise levels: the Karras grid itself, without a final 0."""
    _check_grid("sampling_karras_sigmas", n_steps, sigma_min, sigma_max, 0.0)
    return karras_sigmas(n_steps + 1, sigma_min, sigma_max, rho).flip(0)


def sampling_log_sigmas(
    n_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> Tensor:
    """Return ``n_steps + 1`` descending noise levels from ``sigma_max`` to ``sigma_min``, uniform
    in ``lambda = -ln sigma``: the grid of multistep solvers, which cannot reach 0 in lambda.
    """
    _check_grid("sampling_log_sigmas", n_steps, sigma_min, sigma_max, math.ulp(0.0))
    return log_sigmas(n_steps + 1, sigma_min, sigma_max).flip(0)


def sampling_vp_time_sigmas(
    n_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, power: float = 2.0
) -> Tensor:
    """Return ``n_steps + 1`` descending noise levels, uniform in ``tau^(1/power)`` of VP time."""
    _check_grid("sampling_vp_time_sigmas", n_steps, sigma_min, sigma_max, math.ulp(0.0))
    return vp_time_sigmas(n_steps + 1, sigma_min, sigma_max, power).flip(0)


# --- curricula -------------------------------------------------------------------------------


def ddpm_sigmas(indices: Tensor) -> Tensor:
    """Return the noise levels float64 of some of DDPM's 1000 steps, by their ``indices``.

    Ho et al. 2020 (arXiv:2006.11239): ``beta`` is linear from 1e-4 to 0.02, ``alpha_bar`` the
    product of ``1 - beta``, and the level in EDM's frame ``sqrt((1 - alpha_bar) / alpha_bar)``.
    """
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)[indices]
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def _check_progress(who: str, step: int, total_steps: int) -> None:
    if total_steps < 1 or step < 0:
        raise UserError(
            who,
            f"step {step} of {total_steps}",
            allowed="step 0 or more of at least 1",
            remedy="correct the length of the curriculum",
        )


def sqrt_curriculum(step: int, total_steps: int, s0: int, s1: int) -> int:
    """Return the number of grid points ``N(k)``, from ``s0`` at step 0 to ``s1 + 1`` at the end.

    ``N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1`` (Song et al. 2023,
    arXiv:2303.01469, App. C), in integers: a square root in floating point can miss by one. Steps
    beyond the last count as the last.
    """
    _check_progress("sqrt_curriculum", step, total_steps)
    if s0 > s1 + 1:
        raise UserError(
            "sqrt_curriculum",
            f"s0 {s0}, s1 {s1}",
            allowed="s0 <= s1 + 1",
            remedy="start with the coarser grid",
        )
    step = min(step, total_steps)
    numerator = step * ((s1 + 1) ** 2 - s0**2)
    square = -(-numerator // total_steps) + s0**2  # ceil(sqrt(y)) = ceil(sqrt(ceil(y)))
    return max(math.isqrt(square - 1) + 1, 2) if square > 1 else 2


def doubling_curriculum(step: int, total_steps: int, s0: int, s1: int) -> int:
    """Return the number of grid points ``N(k) = min(s0 2^floor(k/K'), s1) + 1``.

    ``K' = floor(K / (log2 floor(s1/s0) + 1))`` (Song & Dhariwal 2023, arXiv:2310.14189, Sec. 3.4):
    11, 21, 41, …, 1281 for ``s0 = 10``, ``s1 = 1280``, eight stages of equal length.
    """
    _check_progress("doubling_curriculum", step, total_steps)
    if not 1 <= s0 <= s1:
        raise UserError(
            "doubling_curriculum",
            f"s0 {s0}, s1 {s1}",
            allowed="1 <= s0 <= s1",
            remedy="start with the coarser grid",
        )
    stage_steps = max(math.floor(total_steps / (math.log2(s1 // s0) + 1)), 1)
    doublings = min(step // stage_steps, s1.bit_length())  # more cannot change the minimum
    return min(s0 << doublings, s1) + 1


def target_ema_decay(
    n_points: int, s0: int, mu0: float, *, exponent: Literal["paper", "released-code"] = "paper"
) -> float:
    """Return the target network's EMA decay ``mu = exp(s0 ln(mu0) / N)``, ``mu0`` in [0, 1].

    Song et al. 2023, App. C. ``"released-code"`` divides by ``max(N - 1, 1)`` instead, as both
    official repositories do: with ``s0 = 2`` and ``mu0 = 0.9`` it starts at 0.81, not 0.9.
    """
    if not (0 <= mu0 <= 1) or n_points < 1:
        raise UserError(
            "target_ema_decay",
            f"mu0 {mu0:g} at {n_points} points",
            allowed="mu0 in [0, 1], 1 point or more",
            remedy="correct the EMA of the target",
        )
    divisor = n_points if exponent == "paper" else max(n_points - 1, 1)
    return float(mu0 ** (s0 / divisor))


def halving_stages(start_steps: int, end_steps: int = 1) -> tuple[int, ...]:
    """Return the step counts ``start/2, start/4, …, end`` of successive halvings.

    Salimans & Ho 2022 (arXiv:2202.00512), Algorithm 2: the first student has half of the steps
    of the teacher.
    """
    steps, stages = start_steps, []
    while end_steps >= 1 and steps > end_steps and steps % 2 == 0:
        steps //= 2
        stages.append(steps)
    if not stages or steps != end_steps:
        raise UserError(
            "halving_stages",
            f"{start_steps} steps do not halve to {end_steps}",
            allowed="start = end times a power of two, at least 2",
            remedy="choose such a pair, e.g. 1024 and 1",
        )
    return tuple(stages)


# --- proposals: given randomness to noise levels -------------------------------------------------


def lognormal_sigmas(unit_normal: Tensor, p_mean: float, p_std: float) -> Tensor:
    """Return ``sigma = exp(p_mean + p_std n)``, shaped as ``n`` (Karras et al. 2022, Table 1)."""
    return torch.exp(unit_normal * p_std + p_mean)


def lognormal_times(unit_normal: Tensor, p_mean: float, p_std: float, sigma_data: float) -> Tensor:
    """Return angles ``arctan(e^tau / sd)``, ``tau ~ N(p_mean, p_std^2)``, shaped as the normal.

    Lu & Song 2024 (arXiv:2410.11081), Algorithm 1.
    """
    return sigma_to_t(lognormal_sigmas(unit_normal, p_mean, p_std), sigma_data)


def power_sigmas(
    uniform: Tensor, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Return noise levels whose ``1/rho`` power is uniform between the ends.

    ``uniform`` in [0, 1]; the proposal of the continuous-time objective of Song et al. 2023 as
    released, a density proportional to ``sigma^(1/rho - 1)``.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.pow(low + uniform * (high - low), rho)


def lognormal_bin_probabilities(sigmas: Tensor, p_mean: float, p_std: float) -> Tensor:
    """Return the probability of each interval of an ascending grid ``[N]``, float64 ``[N - 1]``.

    ``p(i)`` proportional to ``erf((ln sigma_{i+1} - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_i -
    P_mean) / (sqrt(2) P_std))`` (arXiv:2310.14189, Sec. 3.5). Computed from logarithms of the
    normal distribution function: intervals far in a tail do not round to zero together.
    """
    z = (sigmas.double().log() - p_mean) / p_std
    low, high = z[:-1], z[1:]
    # Mirror intervals right of the mean: differences of small numbers keep their digits.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return torch.softmax(log_high + torch.log(-torch.expm1(log_low - log_high)), 0)


def choose_uniformly(count: int, uniform: Tensor) -> Tensor:
    """Return int64 indices below ``count``, equally likely, from ``uniform`` in [0, 1)."""
    return (uniform * count).long().clamp_max(count - 1)


def choose_bin(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return int64 indices drawn by inverse CDF from ``uniform`` in [0, 1), shaped as it."""
    cumulative = probabilities.cumsum(0)
    scaled = uniform.to(cumulative) * cumulative[-1]
    return torch.searchsorted(cumulative, scaled, right=True).clamp_max(len(probabilities) - 1)


def sigmoid_gap_ratio(t: Tensor, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return ``1 + k sigmoid(-b t)``, shaped as ``t`` (Geng et al. 2024, arXiv:2406.14548)."""
    return 1 + k * torch.sigmoid(-b * t)


def shrinking_gap_time(
    t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0
) -> Tensor:
    """Return the smaller time ``r = max(0, t (1 - n(t) / q^(stage+1)))``, in [0, t).

    Geng et al. 2024 (arXiv:2406.14548), Sec. 3; the gap ``t - r`` shrinks by ``q`` from a stage to
    the next. Where ``r = 0`` the target is the clean image: diffusion training. The gap never
    rounds to zero, which a late stage's would.
    """
    r = t * (1 - sigmoid_gap_ratio(t, k, b) / q ** (stage + 1)).clamp_min(0)
    return torch.minimum(r, t * (1 - torch.finfo(t.dtype).eps))
