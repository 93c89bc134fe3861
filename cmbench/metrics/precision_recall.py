"""Improved precision and recall, density and coverage, in blocks of pairwise distances.

A set's manifold is the union of balls around its points, each reaching to the k-th nearest other
point (Kynkäänniemi et al. 2019, eqs. 1 and 2). Precision is the share of samples inside the
reference's manifold, recall the share of reference points inside the samples'. Density counts the
reference balls around each sample, over k; coverage is the share of reference balls that hold a
sample (Naeem et al. 2020, eqs. 3 and 4). Balls are closed, as in the first paper.

Features are centred on the reference mean in float32 (equal to float64 in every decision measured,
while float16 flips 0.5 % of them). Distances exist one block at a time: memory is
O(block²), whatever the number of points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.metric import MetricData
from cmbench.metrics.precision import exact_float32, row_blocks
from cmbench.metrics.values import Estimate, Json, share_interval

#: Rows of one block of distances: changes memory and speed, not the result.
BLOCK = 4096
#: Neighbours that set a ball's radius.
NEIGHBOURS = 3


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|² ``[N, M]``, clamped at 0."""
    product = torch.addmm(y.square().sum(1)[None], x, y.T, beta=1, alpha=-2)
    return product.add_(x.square().sum(1)[:, None]).clamp_(min=0)


def knn_radii(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return the squared distance of each row to its k-th nearest other row, ``[N]``.

    Blocks above the diagonal serve both of their sides, so each distance is computed once.

    Raises:
        UserError: not more than ``k`` rows.
    """
    count = features.shape[0]
    if count <= k:
        raise UserError(
            "precision and recall",
            f"{count} samples",
            allowed=f"more than k = {k}",
            remedy="evaluate more samples",
        )
    chunks = row_blocks(features, BLOCK)
    nearest = [chunk.new_full((len(chunk), k), torch.inf) for chunk in chunks]
    with exact_float32():
        for i, rows in enumerate(chunks):
            for j in range(i, len(chunks)):
                distances = squared_distances(rows, chunks[j])
                if i == j:
                    distances.fill_diagonal_(torch.inf)
                else:
                    nearest[j] = _keep_nearest(nearest[j], distances.T, k)
                nearest[i] = _keep_nearest(nearest[i], distances, k)
    return torch.cat([values[:, -1] for values in nearest])


def _keep_nearest(nearest: Tensor, distances: Tensor, k: int) -> Tensor:
    """Merge new distances into the k smallest of each row, ascending."""
    fresh = distances.topk(min(k, distances.shape[1]), dim=1, largest=False).values
    return torch.cat([nearest, fresh], 1).topk(k, dim=1, largest=False, sorted=True).values


def precision_recall(
    samples: Tensor,
    reference: Tensor,
    *,
    k: int = NEIGHBOURS,
    reference_radii: Tensor | None = None,
) -> PrecisionRecall:
    """Return precision, recall, density and coverage of ``samples`` ``[N, D]``.

    Args:
        samples: features of generated images.
        reference: features ``[M, D]`` of real images, on the same device.
        k: which neighbour sets a ball's radius.
        reference_radii: :func:`reference_radii` of ``reference``, if known.
    """
    centre = reference.double().mean(0)
    fake, real = _centred(samples, centre), _centred(reference, centre)
    real_radii = knn_radii(real, k) if reference_radii is None else reference_radii
    fake_radii = knn_radii(fake, k)
    inside_real = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=fake.device)
    covered = torch.zeros_like(recalled)
    with exact_float32():
        for j in range(0, len(real), BLOCK):
            real_rows = slice(j, j + BLOCK)
            for i in range(0, len(fake), BLOCK):
                fake_rows = slice(i, i + BLOCK)
                distances = squared_distances(fake[fake_rows], real[real_rows])
                in_real_ball = distances <= real_radii[real_rows][None]
                inside_real[fake_rows] += in_real_ball.sum(1)
                covered[real_rows] |= in_real_ball.any(0)
                recalled[real_rows] |= (distances <= fake_radii[fake_rows][:, None]).any(0)
    return PrecisionRecall(
        precision=float((inside_real > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(inside_real.double().mean() / k),
        coverage=float(covered.double().mean()),
    )


def _centred(features: Tensor, centre: Tensor) -> Tensor:
    return (features.double() - centre).float()


def reference_radii(reference: Tensor) -> Tensor:
    """Return the squared ball radii of a reference ``[M, D]``, for :func:`precision_recall`."""
    return knn_radii(_centred(reference, reference.double().mean(0)))


def share_inside_others(features: Tensor, radii: Tensor) -> float:
    """Return the share of rows ``[N, D]`` that lie in the manifold of the N - 1 others.

    ``radii`` are :func:`reference_radii` of the rows. A row lies in another's ball without being
    one of the neighbours that set its radius exactly if it is one of them, so leaving it out
    changes nothing: the share is what N - 1 points recall of, or how precise they call, one more.
    """
    rows = row_blocks(_centred(features, features.double().mean(0)), BLOCK)
    reach = row_blocks(radii, BLOCK)
    inside = [torch.zeros(len(part), dtype=torch.bool, device=part.device) for part in rows]
    with exact_float32():
        for i in range(len(rows)):
            for j in range(i, len(rows)):
                distances = squared_distances(rows[i], rows[j])
                if i == j:
                    distances.fill_diagonal_(torch.inf)
                else:
                    inside[i] |= (distances <= reach[j][None]).any(1)
                # The very numbers that set the radii: a product's transpose may round otherwise.
                inside[j] |= (distances <= reach[i][:, None]).any(0)
    return float(torch.cat(inside).double().mean())


# ---- metrics ------------------------------------------------------------------------------------


def precision(data: MetricData) -> Estimate:
    """Return improved precision: given the reference, samples are independent trials."""
    value, count = data.shared(_all_four).precision, len(data.features)
    error = math.sqrt(value * (1 - value) / count)
    return _estimate(data, "precision", value, error, share_interval(value, count))


def recall(data: MetricData) -> Estimate:
    """Return improved recall; its sampling error is not known."""
    return _estimate(data, "recall", data.shared(_all_four).recall)


def density(data: MetricData) -> Estimate:
    """Return density; its sampling error is not known."""
    return _estimate(data, "density", data.shared(_all_four).density)


def coverage(data: MetricData) -> Estimate:
    """Return coverage; its sampling error is not known."""
    return _estimate(data, "coverage", data.shared(_all_four).coverage)


def _all_four(data: MetricData) -> PrecisionRecall:
    return precision_recall(
        data.features, data.real_features, reference_radii=data.prepared("radii")
    )


def _estimate(
    data: MetricData,
    name: str,
    value: float,
    error: float | None = None,
    interval: tuple[float, float] | None = None,
) -> Estimate:
    detail: dict[str, Json] = {"k": NEIGHBOURS, "dtype": "float32, centred"}
    if data.floors is not None:
        counts = len(data.features), len(data.real_features)
        detail["floor"] = data.floors.of_share(name, *counts, NEIGHBOURS)
    return Estimate(value, error, interval, detail, (f"k={NEIGHBOURS}", "float32"))
