"""The adaptive Runge-Kutta method of Dormand and Prince, "RK45", with its own steps per sample.

Dormand & Prince 1980; Hairer, Norsett & Wanner, Solving ODEs I, Sec. II.4 and II.5; the step
control is that of ``scipy.integrate.RK45``, which rectified flows are published with. There one
step serves the whole batch, so a sample depends on its neighbours; here every sample has its own
steps and costs its own number of evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.ode import Field
from cmbench.errors import UserError

#: Butcher tableau: nodes, and the weights of earlier slopes for each stage. The last stage is the
#: solution of order 5, so its slope is the first one of the next step.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
#: Order 5 less order 4.
_ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
_SAFETY, _MIN_FACTOR, _MAX_FACTOR = 0.9, 0.2, 10.0
#: Evaluations of a step, and of the choice of the first one.
STEP_EVALUATIONS, START_EVALUATIONS = 6, 2


@dataclass(frozen=True)
class AdaptiveSolution:
    """States at the end, float64 ``[N, ...]``, and the evaluations of each sample, int64 ``[N]``.

    ``cut_short [N]`` says where the last step was taken without regard to its error.
    """

    x: Tensor
    evaluations: Tensor
    cut_short: Tensor


def dormand_prince(
    field: Field,
    x: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    most_evaluations: int | None = None,
) -> AdaptiveSolution:
    """Solve ``dx/dt = field(x, t, rows)`` from ``start`` to ``end``; order 5.

    Args:
        field: the right-hand side, see :data:`cmbench.diffusion.ode.Field`: it is asked for the
            samples ``rows`` that are still on their way.
        x: float64 ``[N, ...]`` at ``start``.
        start: first time.
        end: last time, before or after.
        rtol: relative tolerance of a step's error, root mean square over a sample's values.
        atol: absolute tolerance.
        most_evaluations: of each sample, at least 8. A sample whose last allowed step does not
            reach the end takes it all at once, whatever its error. None: no limit.
    """
    if most_evaluations is not None and most_evaluations < START_EVALUATIONS + STEP_EVALUATIONS:
        raise UserError(
            "dormand_prince",
            f"{most_evaluations} evaluations",
            allowed=f"{START_EVALUATIONS + STEP_EVALUATIONS} or more",
            remedy="allow one step at least",
        )
    run = _Run(field, x.clone(), start, end, rtol, atol)
    while run.rows.numel():
        run.step(most_evaluations)
    return AdaptiveSolution(run.x, run.evaluations, run.cut_short)


class _Run:
    """The samples of one solution, and where each of them is."""

    def __init__(
        self, field: Field, x: Tensor, start: float, end: float, rtol: float, atol: float
    ) -> None:
        self.field, self.x, self.end, self.rtol, self.atol = field, x, end, rtol, atol
        self.direction = 1.0 if end >= start else -1.0
        self.rows = torch.arange(len(x), device=x.device)
        self.t = torch.full((len(x),), start, dtype=torch.float64, device=x.device)
        self.evaluations = torch.zeros_like(self.rows)
        self.cut_short = torch.zeros_like(self.rows, dtype=torch.bool)
        self.rejected = torch.zeros_like(self.cut_short)
        self.slope = field(x, self.t, self.rows)
        self.h = self._first_steps(abs(end - start))
        self.evaluations += START_EVALUATIONS
        if start == end:
            self.rows = self.rows[:0]

    def _first_steps(self, length: float) -> Tensor:
        """Return the sizes of the first steps ``[N]`` (Hairer et al., Sec. II.4)."""
        scale = self.atol + self.x.abs() * self.rtol
        size, speed = _rms(self.x / scale), _rms(self.slope / scale)
        small = (size < 1e-5) | (speed < 1e-5)
        h0 = torch.where(small, 1e-6, 0.01 * size / speed.clamp_min(1e-300)).clamp_max(length)
        guess = self.x + append_dims(h0 * self.direction, self.x) * self.slope
        after = self.field(guess, self.t + h0 * self.direction, self.rows)
        bend = _rms((after - self.slope) / scale) / h0.clamp_min(1e-300)
        flat = (speed <= 1e-15) & (bend <= 1e-15)
        curved = (0.01 / torch.maximum(speed, bend).clamp_min(1e-300)) ** (1 / 5)
        h1 = torch.where(flat, (h0 * 1e-3).clamp_min(1e-6), curved)
        return torch.minimum(100 * h0, h1).clamp_max(length)

    def step(self, most_evaluations: int | None) -> None:
        """Try one step of every sample that has not arrived."""
        rows, t = self.rows, self.t[self.rows]
        left = (self.end - t).abs()
        # Never below the spacing of numbers: there the error is rounding.
        smallest = 10 * torch.finfo(torch.float64).eps * t.abs().clamp_min(1.0)
        h = torch.maximum(self.h[rows], smallest)
        forced = torch.zeros_like(left, dtype=torch.bool)
        if most_evaluations is not None:
            forced = self.evaluations[rows] + 2 * STEP_EVALUATIONS > most_evaluations
        last = (h >= left) | forced
        h = torch.where(last, left, h)
        x, slope, error = self._tried(rows, t, h)
        self.evaluations[rows] += STEP_EVALUATIONS
        broken = ~torch.isfinite(error)  # never smaller: the caller looks at what is returned
        accepted = (error < 1) | forced | broken | (h <= smallest)
        self.x[rows[accepted]], self.slope[rows[accepted]] = x[accepted], slope[accepted]
        self.cut_short[rows] = forced & (error >= 1)
        factor = (_SAFETY * error.clamp_min(1e-30) ** (-1 / 5)).clamp_min(_MIN_FACTOR)
        grows = torch.where(self.rejected[rows] & accepted, 1.0, _MAX_FACTOR)
        self.h[rows] = h * torch.minimum(factor, grows)
        self.t[rows] = torch.where(accepted, t + h * self.direction, t)
        self.rejected[rows] = ~accepted
        self.rows = rows[~((accepted & last) | broken)]

    def _tried(self, rows: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states after ``h``, their slopes, and the errors in tolerances ``[M]``."""
        before, slopes = self.x[rows], [self.slope[rows]]
        step = append_dims(h * self.direction, before)
        x = before
        for node, weights in zip(_NODES, _STAGES, strict=True):
            x = before + step * _weighted(weights, slopes)
            slopes.append(self.field(x, t + node * h * self.direction, rows))
        scale = self.atol + torch.maximum(before.abs(), x.abs()) * self.rtol
        return x, slopes[-1], _rms(step * _weighted(_ERROR, slopes) / scale)


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Return the weighted sum of slopes."""
    pairs = zip(weights, slopes, strict=True)
    return torch.stack([w * k for w, k in pairs if w]).sum(0)


def _rms(x: Tensor) -> Tensor:
    """Return the root mean square of each sample ``[N]``."""
    return x.flatten(1).square().mean(1).sqrt()
