"""A high-order adaptive ODE solver in float64, with its own step size for every sample.

For reference solutions, not for sampling: it is accurate to about 1e-11 and costs hundreds of
evaluations. One step size per sample makes a trajectory independent of the batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: ``field(x [M, ...], t [M], rows [M]) -> dx/dt``; ``rows`` index the batch given to `integrate`.
Field = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Midpoint substeps of one extrapolation step: order 14.
_SUBSTEPS = (2, 4, 6, 8, 10, 12, 14)
_MAX_ROUNDS = 10_000


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(value.shape + (1,) * (x.ndim - 1))


def _midpoint(
    field: Field, x: Tensor, slope: Tensor, t: Tensor, h: Tensor, rows: Tensor, substeps: int
) -> Tensor:
    """Integrate over ``h`` by the modified midpoint rule, whose error is even in the substep."""
    sub = h / substeps
    wide = _per_sample(sub, x)
    before, now = x, x + wide * slope
    for index in range(1, substeps):
        before, now = now, before + 2 * wide * field(now, t + index * sub, rows)
    return now


def _extrapolated_step(
    field: Field, x: Tensor, t: Tensor, h: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the solution after ``h`` and its error estimate (Gragg-Bulirsch-Stoer)."""
    slope = field(x, t, rows)
    previous_row: list[Tensor] = []
    for j, substeps in enumerate(_SUBSTEPS):
        row = [_midpoint(field, x, slope, t, h, rows, substeps)]
        for m in range(1, j + 1):  # Aitken-Neville in h^2
            ratio = (substeps / _SUBSTEPS[j - m]) ** 2
            row.append(row[m - 1] + (row[m - 1] - previous_row[m - 1]) / (ratio - 1))
        previous_row = row
    return previous_row[-1], previous_row[-1] - previous_row[-2]


def integrate(
    field: Field, x: Tensor, t_start: Tensor, t_end: Tensor, *, tolerance: float = 1e-12
) -> Tensor:
    """Return the solution at ``t_end`` of ``dx/dt = field(x, t)`` from ``x`` at ``t_start``.

    Args:
        field: the right-hand side, see :data:`Field`.
        x: float64 ``[N, ...]``.
        t_start: float64 ``[N]``.
        t_end: float64 ``[N]``, before or after ``t_start``, sample by sample.
        tolerance: bound on each step's estimated error, relative to ``max(|x|, 1)``.

    Extrapolation of the modified midpoint rule (Hairer, Norsett & Wanner, Solving ODEs I, Sec.
    II.9) at fixed order 14, step size controlled per sample. No gradient flows through it.

    """
    with torch.no_grad():
        x, t = x.clone(), t_start.clone()
        h = (t_end - t_start) / 4
        # Below this step rounding, not truncation, makes the error estimate: take it as it is.
        smallest = (t_end - t_start).abs() * 1e-6
        rows = torch.nonzero(t != t_end).squeeze(1)
        for _ in range(_MAX_ROUNDS):
            if rows.numel() == 0:
                return x
            x_rows, remaining = x[rows], t_end[rows] - t[rows]
            last = h[rows].abs() >= remaining.abs() * (1 - 1e-12)
            step = torch.where(last, remaining, h[rows])
            candidate, error = _extrapolated_step(field, x_rows, t[rows], step, rows)
            scale = candidate.flatten(1).abs().amax(1).clamp_min(1) * tolerance
            ratio = error.flatten(1).abs().amax(1) / scale
            accept = (ratio <= 1) | (step.abs() <= smallest[rows])
            x[rows] = torch.where(_per_sample(accept, x_rows), candidate, x_rows)
            landed = torch.where(last, t_end[rows], t[rows] + step)
            t[rows] = torch.where(accept, landed, t[rows])
            order = 2 * len(_SUBSTEPS) - 1
            h[rows] = step * (0.9 * ratio.clamp_min(1e-30) ** (-1 / order)).clamp(0.2, 3.0)
            rows = rows[~(accept & last)]
        raise AssertionError(f"the reference ODE did not finish in {_MAX_ROUNDS} rounds")
