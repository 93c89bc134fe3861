from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from kernel_subsets import kernel_distance_of_subsets
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics import kernel_distance as module
from cmbench.metrics.kernel_distance import cubic_kernel, kernel_distance, self_kernel


def rows(count: int, seed: int, scale: float = 1.0, offset: float = 0.0, dim: int = 6) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + offset


def test_equals_the_definition_for_unequal_counts() -> None:
    x, y = rows(40, 0, 1.1).double(), rows(55, 1).double()
    kxx, kyy = cubic_kernel(x, x), cubic_kernel(y, y)
    truth = (kxx.sum() - kxx.trace()) / (40 * 39) + (kyy.sum() - kyy.trace()) / (55 * 54)
    truth -= 2 * cubic_kernel(x, y).mean()
    assert kernel_distance(x, y)[0] == pytest.approx(float(truth), rel=1e-12)


def test_blocks_and_cached_reference_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(101, 2, 1.2), rows(77, 3)
    whole = kernel_distance(x, y)
    for block in (1, 10, 50, 1000):
        monkeypatch.setattr(module, "BLOCK", block)
        part = kernel_distance(x, y, self_kernel(y))
        assert part[0] == pytest.approx(whole[0], rel=1e-10)
        assert part[1] == pytest.approx(whole[1], rel=1e-8)


def test_both_forms_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = rows(300, 4, 1.1).double(), rows(300, 5).double()
    options = {
        "kid_kernel": "poly",
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
        "rng_seed": 2020,
        "verbose": False,
    }
    theirs = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=100, **options)
    mean, spread = kernel_distance_of_subsets(x, y, subsets=20, subset_size=100)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    whole = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=300, **options)
    exact = whole["kernel_inception_distance_mean"]
    assert kernel_distance(x, y)[0] == pytest.approx(exact, rel=1e-9)


def test_standard_error_is_the_formula_for_unequal_counts() -> None:
    """The variances of both projections and of the residuals, from whole kernel matrices."""
    n, m = 25, 90
    x, y = rows(n, 6, 1.6, 0.5).double(), rows(m, 7).double()
    kxx, kyy, kxy = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)

    def own(kernel: Tensor, count: int) -> tuple[Tensor, float]:
        """Row means without the diagonal, and the variance of the second-order residual."""
        off = kernel - kernel.diag().diag()
        means, square = off.sum(1) / (count - 1), float(off.square().sum()) / (count * (count - 1))
        residual = square - float(means.mean()) ** 2 - 2 * float(means.var())
        return means, residual / (1 - 2 / (count - 1))

    (mean_x, residual_x), (mean_y, residual_y) = own(kxx, n), own(kyy, m)
    cross_x, cross_y = kxy.mean(1), kxy.mean(0)
    residual_xy = float(kxy.square().mean() - kxy.mean() ** 2 - cross_x.var() - cross_y.var())
    first_x = float((mean_x - cross_x).var()) - residual_x / (n - 1) - residual_xy / m
    first_y = float((mean_y - cross_y).var()) - residual_y / (m - 1) - residual_xy / n
    assert min(first_x, first_y, residual_x, residual_y, residual_xy) > 0, "no term is clamped"
    variance = 4 * first_x / n + 4 * first_y / m + 4 * residual_xy / (n * m)
    variance += 2 * residual_x / (n * (n - 1)) + 2 * residual_y / (m * (m - 1))
    assert kernel_distance(x, y)[1] == pytest.approx(math.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(30, 300), (300, 30)])
def test_standard_error_is_the_spread_for_unequal_counts(n: int, m: int) -> None:
    """200 repetitions know a spread to 5 %, of heavy tails to 10: swapped counts are off by 2."""
    found = [
        kernel_distance(rows(n, seed, 1.4, 0.3), rows(m, seed + 10_000)) for seed in range(200)
    ]
    values, errors = np.array(found).T
    assert math.sqrt(np.mean(errors**2)) == pytest.approx(np.std(values), rel=0.3)


@cache
def repetitions(scale: float, offset: float) -> tuple[tuple[float, float], ...]:
    return tuple(
        kernel_distance(rows(80, seed, scale, offset), rows(120, seed + 10_000))
        for seed in range(400)
    )


def repeated(scale: float, offset: float) -> tuple[float, float]:
    """Return the spread of the value and the root mean square of its error, 400 repetitions."""
    values, errors = np.array(repetitions(scale, offset)).T
    return float(np.std(values)), math.sqrt(np.mean(np.square(errors)))


def test_standard_error_is_the_spread_over_repetitions() -> None:
    """400 repetitions know a spread to 3.5 %: the tolerance is 4.3 of those."""
    spread, error = repeated(1.3, 0.3)
    assert error == pytest.approx(spread, rel=0.15)


def test_standard_error_of_equal_distributions() -> None:
    """The first-order terms vanish here; an estimate without the second would be near zero."""
    spread, error = repeated(1.0, 0.0)
    assert 0.93 * spread < error < 1.10 * spread


def test_intervals_cover() -> None:
    """Of 400 intervals 95 % hold the true value, which is 0, but for three standard errors."""
    found = repetitions(1.0, 0.0)
    share = np.mean([abs(value) < 1.96 * error for value, error in found])
    assert 0.917 < share < 0.983


def test_unbiased_for_equal_distributions() -> None:
    values = [kernel_distance(rows(50, s), rows(50, s + 10_000))[0] for s in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(300)


def test_bad_counts_are_named() -> None:
    with pytest.raises(UserError, match="3 samples; allowed: at least 4"):
        kernel_distance(rows(3, 0), rows(10, 1))
