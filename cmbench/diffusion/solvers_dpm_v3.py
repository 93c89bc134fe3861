"""DPM-Solver-v3: an exponential multistep solver fitted to statistics of the model.

Zheng et al. 2023 (arXiv:2310.13268), Sec. 3, in the EDM frame with ``lambda = -ln sigma``. The
network's term is split as ``x - D = l x + f``. ``l``, ``s`` and ``b`` are chosen so that ``f``
changes along trajectories nearly as ``df/dlambda = s f + b``; the solver integrates this exactly
and extrapolates what is left. They are one value per data value and point of a uniform grid in
lambda, estimated before sampling (:func:`estimate_statistics`). Integrals are trapezoid sums on
that grid, as released.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.solvers import (
    Denoiser,
    NoiseSampler,
    batch_sigma,
    check_order,
    ddim_step,
    ends_at_zero,
)


def _trapezoids(values: Tensor, grid: Tensor) -> Tensor:
    """Return the areas between neighbouring points of ``grid [K + 1]``: ``[K, ...]``."""
    return (values[1:] + values[:-1]) / 2 * append_dims(grid.diff(), values)


def _integral(values: Tensor, grid: Tensor) -> Tensor:
    """Return the trapezoid integral from the first point to each, ``[K + 1, ...]``."""
    areas = _trapezoids(values, grid)
    return torch.cat([torch.zeros_like(values[:1]), areas.cumsum(0)])


@dataclass(frozen=True)
class ModelStatistics:
    """The paper's empirical model statistics.

    Args:
        lambdas: uniform ascending grid ``[K + 1]`` of ``-ln sigma``, float64.
        l: linear coefficient ``[K + 1, C, H, W]`` or with axes of 1.
        s: slope of ``df/dlambda`` on ``f``, shaped as ``l``.
        b: its offset, shaped as ``l``.
    """

    lambdas: Tensor
    l: Tensor  # noqa: E741 - the paper's name
    s: Tensor
    b: Tensor

    @classmethod
    def degenerate(
        cls, sigma_min: float, sigma_max: float, intervals: int = 1200
    ) -> ModelStatistics:
        """Return the case without statistics: ``l = 1``, ``s = b = 0``, exponential Adams on ``D``.

        Order 1 is DDIM; higher orders are DPM-Solver++ with exact integrals of the polynomials.
        """
        ends = -math.log(sigma_max), -math.log(sigma_min)
        grid = torch.linspace(*ends, intervals + 1, dtype=torch.float64)
        ones = torch.ones((intervals + 1, 1, 1, 1), dtype=torch.float64)
        return cls(grid, ones, torch.zeros_like(ones), torch.zeros_like(ones))

    def on(self, device: torch.device) -> ModelStatistics:
        """Return the same statistics on a device."""
        moved = [t.to(device) for t in (self.lambdas, self.l, self.s, self.b)]
        return ModelStatistics(*moved)

    def nearest(self, sigmas: Tensor) -> list[int]:
        """Return the grid points nearest to noise levels ``[n]``: the solver visits no others."""
        gaps = (-sigmas.double().cpu().log())[:, None] - self.lambdas.cpu()
        index: list[int] = gaps.abs().argmin(1).tolist()
        return index

    @cached_property
    def A(self) -> Tensor:
        """Integral of ``l``, as ``B`` of ``s``."""
        return _integral(self.l, self.lambdas)

    @cached_property
    def B(self) -> Tensor:
        """Integral of ``s``."""
        return _integral(self.s, self.lambdas)

    @cached_property
    def I(self) -> Tensor:  # noqa: E743
        """Integral of ``e^{A + B}``."""
        return _integral((self.A + self.B).exp(), self.lambdas)

    @cached_property
    def beta(self) -> Tensor:
        """Integral of ``e^{-B} b``."""
        return _integral((-self.B).exp() * self.b, self.lambdas)

    @cached_property
    def C(self) -> Tensor:
        """Integral of ``e^{A + B} beta``."""
        return _integral((self.A + self.B).exp() * self.beta, self.lambdas)

    def moment(self, i: int, j: int, m: int) -> Tensor:
        """Return ``E_m``: the integral from i to j of ``e^{A + B - A_i - B_i} u^m / m!``."""
        u = self.lambdas[i : j + 1] - self.lambdas[i]
        growth = (self.A[i : j + 1] + self.B[i : j + 1] - self.A[i] - self.B[i]).exp()
        values = growth * append_dims(u**m / math.factorial(m), growth)
        return _trapezoids(values, self.lambdas[i : j + 1]).sum(0)


@dataclass(frozen=True)
class _Node:
    """A point that was evaluated: its place on the grid and ``f = (x - D) - l x`` there."""

    index: int
    f: Tensor


def _derivatives(gaps: Sequence[float], values: Sequence[Tensor], pseudo: bool) -> list[Tensor]:
    """Return ``g', g'', …`` at the first node from ``values`` at ``gaps`` from it.

    Derivatives of the polynomial through all nodes, or with ``pseudo`` the divided differences of
    the first two, three … nodes, times the factorial.
    """
    count = len(values)
    if pseudo:
        row, found = list(values), []
        for m in range(1, count):
            row = [(row[a + 1] - row[a]) / (gaps[a + m] - gaps[a]) for a in range(count - m)]
            found.append(math.factorial(m) * row[0])
        return found
    powers = torch.tensor([[gap**m for m in range(count)] for gap in gaps], dtype=torch.float64)
    inverse = torch.linalg.inv(powers).tolist()
    return [
        math.factorial(m) * sum((w * v for w, v in zip(inverse[m], values, strict=True)))
        for m in range(1, count)
    ]


def _step(
    statistics: ModelStatistics, x: Tensor, nodes: Sequence[_Node], j: int, pseudo: bool
) -> Tensor:
    """Return the state at grid point ``j`` from ``x`` at ``nodes[0]``."""
    i, m = nodes[0].index, statistics
    values = [
        (m.B[i] - m.B[n.index]).exp() * n.f - m.B[i].exp() * (m.beta[n.index] - m.beta[i])
        for n in nodes
    ]
    gaps = [float(m.lambdas[n.index] - m.lambdas[i]) for n in nodes]
    carried, area = (m.A[i] - m.A[j]).exp(), m.I[j] - m.I[i]
    out = carried * x - (-m.A[j] - m.B[i]).exp() * area * nodes[0].f
    out = out - (-m.A[j]).exp() * (m.C[j] - m.C[i] - m.beta[i] * area)
    for order, derivative in enumerate(_derivatives(gaps, values, pseudo), 1):
        out = out - carried * m.moment(i, j, order) * derivative
    return out


def dpm_solver_v3(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    statistics: ModelStatistics,
    *,
    labels: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: int = 3,
    pseudo: bool = False,
    corrector: bool = False,
    lower_order_final: bool = True,
) -> Tensor:
    """Solve by DPM-Solver-v3: order 1 to 3, NFE = steps (arXiv:2310.13268).

    Noise levels are rounded to the grid of ``statistics``. ``corrector`` repeats each step but the
    last with the evaluation at its end, which is not repeated. ``pseudo`` takes the paper's
    pseudo-order form for both. The order rises in the first steps and, with ``lower_order_final``,
    falls in the last. A step to 0 is a first-order step.
    """
    check_order("dpm_solver_v3", "order", order, 1, 3)
    to_zero, count = ends_at_zero(sigmas), len(sigmas) - 1
    statistics = statistics.on(x.device)
    index = statistics.nearest(sigmas[:-1] if to_zero else sigmas)

    def evaluate(x: Tensor, k: int) -> tuple[Tensor, _Node]:
        level = (-statistics.lambdas[index[k]]).exp()
        denoised = denoise(x, batch_sigma(level, x), labels)
        return denoised, _Node(index[k], (x - denoised) - statistics.l[index[k]] * x)

    denoised, node = evaluate(x, 0)
    nodes = [node]
    for k in range(count):
        if to_zero and k == count - 1:
            return ddim_step(x, denoised, sigmas[k], sigmas[k + 1])
        now = min(order, k + 1, count - k if lower_order_final else order)
        end = index[k + 1]
        predicted = _step(statistics, x, nodes[:now], end, pseudo).to(x)
        if k == count - 1:
            return predicted
        denoised, node = evaluate(predicted, k + 1)
        again = now + pseudo
        if corrector and again > 1:
            used = [nodes[0], node, *nodes[1 : again - 1]]
            predicted = _step(statistics, x, used, end, pseudo).to(x)
        x, nodes = predicted, [node, *nodes[:2]]
    return x


# --- statistics ------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatisticsBatch:
    """Clean images ``[N, C, H, W]``, unit noise and random signs of the same shape, and labels."""

    images: Tensor
    noise: Tensor
    signs: Tensor
    labels: Tensor | None = None


def estimate_statistics(
    denoise: Denoiser, batches: Sequence[StatisticsBatch], lambdas: Tensor
) -> ModelStatistics:
    """Estimate :class:`ModelStatistics` from a differentiable denoiser and noisy data.

    ``l`` is the mean of the diagonal of the derivative of ``x - D`` by ``x``, from random
    signs ``v`` as ``v * (J^T v)``; ``s`` and ``b`` are the regression of ``df/dlambda`` on ``f``,
    each data value on its own. The total derivative along the trajectory is a central
    difference over half a grid interval either way. Costs 1 evaluation with gradient and 3 without
    per image and grid point. Where ``f`` varies by less than 1e-6 of ``x - D``, ``s`` is 0.
    """
    l = torch.stack([_mean(_diagonals(denoise, batches, u)) for u in lambdas])  # noqa: E741
    (slope,) = torch.gradient(l, spacing=(lambdas,), dim=0)
    spacing = float(lambdas[1] - lambdas[0])
    pairs = [
        _regression(*_changes(denoise, batches, u, spacing / 2, l[k], slope[k]))
        for k, u in enumerate(lambdas)
    ]
    return ModelStatistics(
        lambdas, l, torch.stack([s for s, _ in pairs]), torch.stack([b for _, b in pairs])
    )


def _mean(parts: Iterable[Tensor]) -> Tensor:
    """Return the mean over images of several batches."""
    return torch.cat(list(parts)).double().mean(0)


def _remainder(denoise: Denoiser, x: Tensor, u: Tensor | float, labels: Tensor | None) -> Tensor:
    """Return ``x - D`` at ``lambda = u``."""
    return x - denoise(x, batch_sigma(torch.as_tensor(-u).exp(), x), labels)


def _diagonals(
    denoise: Denoiser, batches: Sequence[StatisticsBatch], u: Tensor
) -> Iterable[Tensor]:
    for batch in batches:
        x = (batch.images + (-u).exp().to(batch.images) * batch.noise).requires_grad_()
        with torch.enable_grad():
            remainder = _remainder(denoise, x, u, batch.labels)
        (product,) = torch.autograd.grad(remainder, x, batch.signs)
        yield batch.signs * product


@torch.no_grad()
def _changes(
    denoise: Denoiser,
    batches: Sequence[StatisticsBatch],
    u: Tensor,
    half: float,
    l: Tensor,  # noqa: E741
    slope: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``f``, ``df/dlambda`` and ``x - D`` of all images: ``dx/dlambda`` is ``D - x``."""
    f, change, remainders = [], [], []
    for batch in batches:
        x = batch.images + (-u).exp().to(batch.images) * batch.noise
        now = _remainder(denoise, x, u, batch.labels)
        after = _remainder(denoise, x - half * now, u + half, batch.labels)
        before = _remainder(denoise, x + half * now, u - half, batch.labels)
        f.append(now - l * x)
        remainders.append(now)
        change.append((after - before) / (2 * half) - slope * x + l * now)
    return torch.cat(f).double(), torch.cat(change).double(), torch.cat(remainders).double()


def _regression(f: Tensor, change: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and offset of ``change`` on ``f``, value by value over images."""
    centred = f - f.mean(0)
    variance = centred.square().mean(0)
    constant = variance <= 1e-12 * scale.square().mean(0)
    s = (centred * change).mean(0) / torch.where(constant, 1, variance)
    s = torch.where(constant, 0, s)
    return s, change.mean(0) - s * f.mean(0)
