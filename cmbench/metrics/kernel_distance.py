"""Kernel (Inception) distance: squared maximum mean discrepancy with a cubic kernel.

    k(x, y) = (xᵀy / D + 1)³      (Bińkowski et al. 2018, sec. 4)

The exact unbiased U-statistic over all pairs costs what 100 random subsets of 1,000 cost at 10k
samples and has no scatter of its own, so it is the value; its interval follows from the Hoeffding
decomposition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.metric import MetricData
from cmbench.metrics.precision import row_blocks
from cmbench.metrics.values import Estimate, Json, normal_interval

#: Rows of one block of kernel values: changes memory and speed only.
BLOCK = 2048


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (xᵀy / D + 1)³ for all pairs, ``[N, M]``."""
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True, eq=False)
class SelfKernel:
    """What one set contributes by itself: row means of k(x_i, x_j), j != i, and the mean square."""

    row_means: Tensor
    mean_square: float

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.row_means)

    @property
    def mean(self) -> float:
        """Mean of the kernel over ordered pairs."""
        return float(self.row_means.mean())

    @property
    def residual(self) -> float:
        """Variance of what is left of k after its mean and both first-order projections."""
        first_order = self.mean_square - self.mean**2 - 2 * float(self.row_means.var())
        # The variance of the row means holds residual / (count - 1) of noise, twice over.
        return max(0.0, first_order / (1 - 2 / (self.count - 1)))


def self_kernel(features: Tensor) -> SelfKernel:
    """Return the kernel sums within one set ``[N, D]``, in float64, N >= 4."""
    count = features.shape[0]
    if count < 4:
        raise UserError(
            "kernel distance",
            f"{count} samples",
            allowed="at least 4",
            remedy="evaluate more samples",
        )
    chunks = row_blocks(features.double(), BLOCK)
    sums = [chunk.new_zeros(len(chunk)) for chunk in chunks]
    squares = 0.0
    for i, rows in enumerate(chunks):
        for j in range(i, len(chunks)):
            values = cubic_kernel(rows, chunks[j])
            if i == j:
                values.fill_diagonal_(0)
            else:
                sums[j] += values.sum(0)
            sums[i] += values.sum(1)
            squares += (1 if i == j else 2) * float(values.square().sum())
    return SelfKernel(torch.cat(sums) / (count - 1), squares / (count * (count - 1)))


def kernel_distance(
    samples: Tensor, reference: Tensor, reference_self: SelfKernel | None = None
) -> tuple[float, float]:
    """Return the exact unbiased squared MMD of ``[N, D]`` and ``[M, D]``, and its standard error.

    Computed in float64; the distance may be slightly negative.

    Args:
        samples: features of generated images.
        reference: features of real images, on the same device.
        reference_self: :func:`self_kernel` of ``reference``, if known.

    The standard error sums the variances of the first-order projections and of the second-order
    residuals; the latter alone remain where both sets have one distribution. The first sum, being
    an estimate, may then be below zero; the total is kept from half the second-order one up.
    Simulated (400 repetitions of 12 cases from equal to clearly different Gaussians), the error is
    0.95 to 1.08 of the spread, and 91 to 96 % of the 95 % intervals cover.
    """
    x, y = samples.double(), reference.double()
    xx = self_kernel(x)
    yy = self_kernel(y) if reference_self is None else reference_self
    cross_x, cross_y, cross_square = _cross_kernel(x, y)
    cross = float(cross_x.mean())
    n, m = len(x), len(y)
    residual_xy = max(0.0, cross_square - cross**2 - float(cross_x.var()) - float(cross_y.var()))
    project_x = _projection_variance(xx, cross_x, residual_xy / m)
    project_y = _projection_variance(yy, cross_y, residual_xy / n)
    variance = 4 * project_x / n + 4 * project_y / m
    within = 2 * xx.residual / (n * (n - 1)) + 2 * yy.residual / (m * (m - 1))
    across = 4 * residual_xy / (n * m)
    variance = max(variance + within + across, (within + across) / 2)
    return xx.mean + yy.mean - 2 * cross, math.sqrt(variance)


def _cross_kernel(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return row means, column means and mean square of k(x_i, y_j)."""
    rows, columns, squares = x.new_zeros(len(x)), y.new_zeros(len(y)), 0.0
    for i in range(0, len(x), BLOCK):
        for j in range(0, len(y), BLOCK):
            values = cubic_kernel(x[i : i + BLOCK], y[j : j + BLOCK])
            rows[i : i + BLOCK] += values.sum(1)
            columns[j : j + BLOCK] += values.sum(0)
            squares += float(values.square().sum())
    return rows / len(y), columns / len(x), squares / (len(x) * len(y))


def _projection_variance(own: SelfKernel, cross: Tensor, cross_noise: float) -> float:
    """Variance of E[k(x, X')] - E[k(x, Y)] over x, less the noise of the two finite means."""
    spread = float((own.row_means - cross).var())
    return spread - own.residual / (own.count - 1) - cross_noise


def metric(data: MetricData) -> Estimate:
    """Return the kernel distance of pooled features: KID on the Inception network."""
    samples, real = data.features, data.real_features
    value, error = kernel_distance(samples, real, data.prepared("kernel"))
    detail: dict[str, Json] = {"value": value, "standard_error": error}
    detail["estimator"] = "exact U-statistic, cubic kernel"
    if data.floors is not None:
        detail["floor"] = data.floors.of_unbiased(len(samples), len(real))
    facts = ("u-statistic", "float64")
    return Estimate(value, error, normal_interval(value, error), detail, facts)
