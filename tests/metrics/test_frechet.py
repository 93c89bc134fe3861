from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from gaussians import F64, blocks, commuting, generator, orthogonal, samples_with_covariance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.frechet import (
    distance_of_rows,
    frechet_distance,
    frechet_standard_error,
    half_split_infinity,
)
from cmbench.metrics.statistics import FeatureStatistics, Moments, moments_of


def moments(mean: Tensor, cov: Tensor) -> Moments:
    return Moments(mean.double(), cov.double())


def random_features(count: int, dim: int, seed: int) -> Tensor:
    mixing = torch.randn(dim, dim, generator=generator(seed + 1000), dtype=F64)
    return torch.randn(count, dim, generator=generator(seed), dtype=F64) @ mixing + seed


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(1e-3, 10), st.floats(1e-3, 10))
def test_closed_form_in_one_dimension(m1: float, m2: float, s1: float, s2: float) -> None:
    a = moments(torch.tensor([m1]), torch.tensor([[s1**2]]))
    b = moments(torch.tensor([m2]), torch.tensor([[s2**2]]))
    # The inputs pass through float32 tensors, as any user's might.
    mean1, mean2 = float(a.mean), float(b.mean)
    std1, std2 = math.sqrt(float(a.cov)), math.sqrt(float(b.cov))
    truth = (mean1 - mean2) ** 2 + (std1 - std2) ** 2
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-10, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_closed_form_of_commuting_covariances(seed: int, dim: int) -> None:
    a, b = torch.rand(2, dim, generator=generator(seed), dtype=F64) * 4
    s1, s2, _ = commuting(dim, a, b, seed)
    mean = torch.randn(dim, generator=generator(seed), dtype=F64)
    truth = float(mean @ mean + (a.sqrt() - b.sqrt()).square().sum())
    distance = frechet_distance(Moments(mean, s1), Moments(torch.zeros(dim, dtype=F64), s2))
    assert distance == pytest.approx(truth, rel=1e-9, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 16), st.data())
def test_exact_for_any_rank_without_commuting(seed: int, pairs: int, data: st.DataObject) -> None:
    singular = data.draw(st.integers(0, pairs))
    s1, s2, root = blocks(pairs, seed, singular=singular)
    zero = torch.zeros(2 * pairs, dtype=F64)
    truth = float(s1.trace() + s2.trace()) - 2 * root
    distance = frechet_distance(Moments(zero, s1), Moments(zero, s2))
    assert distance == pytest.approx(truth, rel=1e-9, abs=1e-9)


def test_exact_with_fewer_samples_than_features_on_either_side() -> None:
    dim, count = 120, 40
    root1, root2 = orthogonal(dim, 3)[:, :30], orthogonal(dim, 4)[:, :25]
    root1 = root1 * torch.linspace(0.1, 3, 30, dtype=F64)
    root2 = root2 * torch.linspace(0.2, 2, 25, dtype=F64)
    a = moments_of(samples_with_covariance(count, root1, 5))
    b = moments_of(samples_with_covariance(count, root2, 6))
    # The nuclear norm of the small cross product of the factors, known before any d x d matrix.
    truth = float(root1.square().sum() + root2.square().sum())
    truth -= 2 * float(torch.linalg.svdvals(root1.T @ root2).sum())
    assert frechet_distance(a, b) == pytest.approx(truth, abs=1e-9)
    full = moments_of(random_features(500, dim, 7))
    root_full = torch.linalg.cholesky(full.cov)
    truth = float(full.mean @ full.mean + full.cov.trace() + root1.square().sum())
    truth -= 2 * float(torch.linalg.svdvals(root1.T @ root_full).sum())
    assert frechet_distance(a, full) == pytest.approx(truth, rel=1e-11)
    assert frechet_distance(full, a) == pytest.approx(truth, rel=1e-11)


def test_the_usual_route_is_not_exact_there() -> None:
    """What the two tests above hold would fail for eigvals(S1 S2): the yardstick is sharp."""
    s1, s2, root = blocks(64, 11, singular=64)
    usual = np.sqrt(np.linalg.eigvals(s1.numpy() @ s2.numpy()).astype(complex)).real.sum()
    ours = Moments(torch.zeros(128, dtype=F64), s2)
    exact = float(s1.trace() + s2.trace()) - 2 * root
    assert abs(usual - root) > 1e-8
    distance = frechet_distance(Moments(torch.zeros(128, dtype=F64), s1), ours)
    assert distance == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 10, 31, 32, 33, 64, 65, 300])
@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5])
def test_self_distance_is_zero_at_any_count(count: int, decay: float) -> None:
    """Spectra down to 1e-27 of their largest eigenvalue included."""
    scale = 10 ** (-decay * torch.arange(64, dtype=F64)) * 3
    rows = torch.randn(count, 64, generator=generator(count), dtype=F64) * scale
    rows = rows @ orthogonal(64, 1)
    statistics = moments_of(rows)
    assert 0 <= frechet_distance(statistics, statistics) <= 1e-9


def test_self_distance_with_dead_and_equal_features() -> None:
    rows = torch.randn(50, 20, generator=generator(0), dtype=F64)
    rows[:, 5:9] = 0
    rows[:, 12] = rows[:, 13]
    statistics = moments_of(rows)
    assert frechet_distance(statistics, statistics) <= 1e-9


def test_symmetric_and_positive() -> None:
    a = moments_of(random_features(100, 12, 1))
    b = moments_of(random_features(9, 12, 2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 0


def test_value_does_not_depend_on_order_or_division_of_samples() -> None:
    rows, reference = random_features(400, 24, 3), random_features(500, 24, 4)
    other = moments_of(reference)
    whole = frechet_distance(moments_of(rows), other)
    shuffled = rows[torch.randperm(400, generator=generator(0))]
    parts = FeatureStatistics(24)
    for part in shuffled.split(57):
        parts.update(part)
    assert frechet_distance(parts.moments(), other) == pytest.approx(whole, abs=1e-9)


class TestAgainstLibraries:
    rows_a, rows_b = random_features(400, 48, 5), random_features(300, 48, 6)

    def ours(self) -> float:
        return frechet_distance(moments_of(self.rows_a), moments_of(self.rows_b))

    def test_scipy_sqrtm(self) -> None:
        a, b = self.rows_a.numpy(), self.rows_b.numpy()
        s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = scipy.linalg.sqrtm(s1 @ s2)
        delta = a.mean(0) - b.mean(0)
        truth = delta @ delta + np.trace(s1 + s2 - 2 * root.real)
        assert self.ours() == pytest.approx(truth, rel=1e-9)

    def test_torch_fidelity(self) -> None:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        value = fid_statistics_to_metric(
            fid_features_to_statistics(self.rows_a), fid_features_to_statistics(self.rows_b), False
        )
        assert self.ours() == pytest.approx(value["frechet_inception_distance"], rel=1e-9)

    @pytest.mark.skipif(
        "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters,
        reason="clean-fid calls sqrtm(disp=False), which scipy 1.18 removed",
    )
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_clean_fid(self) -> None:
        from cleanfid.fid import fid_from_feats

        value = fid_from_feats(self.rows_a.numpy(), self.rows_b.numpy())
        assert self.ours() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "dim"), [(10, 14, 40), (30, 30, 40), (9, 200, 12)])
def test_the_distance_of_rows_is_that_of_their_moments(n: int, m: int, dim: int) -> None:
    """Few rows are compared by their products, many by their covariances."""
    a, b = random_features(n, dim, 1), random_features(m, dim, 2)
    expected = frechet_distance(moments_of(a), moments_of(b))
    assert distance_of_rows(a, b) == pytest.approx(expected, rel=1e-10)


def test_cached_factor_gives_the_same_value() -> None:
    a = moments_of(random_features(100, 12, 1))
    b = moments_of(random_features(100, 12, 2))
    assert frechet_distance(a, replace(b, known_factor=b.factor.clone())) == frechet_distance(a, b)


def test_factor_reproduces_the_covariance_within_its_rank() -> None:
    statistics = moments_of(random_features(10, 30, 1))
    factor = statistics.factor
    assert factor.shape == (30, 9)
    torch.testing.assert_close(factor @ factor.T, statistics.cov, rtol=0, atol=1e-11)


def test_delta_method_error_is_the_spread_over_repetitions() -> None:
    """300 repetitions know a standard deviation to 4.1 %: the tolerance is 3.7 of those."""
    reference = moments_of(skewed(20_000, 1))
    values, errors = [], []
    for seed in range(300):
        rows = skewed(400, seed + 100) * 1.1 + 0.2
        statistics = moments_of(rows)
        values.append(frechet_distance(statistics, reference))
        errors.append(frechet_standard_error(statistics, reference, rows))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_half_split_removes_the_bias_and_its_interval_covers_the_limit() -> None:
    reference = moments_of(skewed(20_000, 1))
    limit = frechet_distance(moments_of(skewed(400_000, 2) * 1.1 + 0.2), reference)
    raw, corrected, covered = [], [], 0
    for seed in range(300):
        rows = skewed(400, seed + 100) * 1.1 + 0.2
        statistics = moments_of(rows)
        value = frechet_distance(statistics, reference)
        first, second = (moments_of(half) for half in rows.chunk(2))
        infinity = half_split_infinity(
            value,
            (frechet_distance(first, reference), frechet_distance(second, reference)),
            frechet_standard_error(statistics, reference, rows),
        )
        raw.append(value)
        corrected.append(infinity.value)
        assert infinity.interval is not None
        covered += infinity.interval[0] <= limit <= infinity.interval[1]
    sem = np.std(corrected) / math.sqrt(300)
    assert np.mean(raw) - limit > 10 * sem, "there must be a bias to remove"
    assert abs(np.mean(corrected) - limit) < 3 * sem
    assert 0.90 <= covered / 300 <= 1.0


def skewed(count: int, seed: int) -> Tensor:
    """Return non-Gaussian features ``[count, 16]``: a power-law spectrum, clipped below."""
    rows = torch.randn(count, 16, generator=generator(seed), dtype=F64).clamp(min=-0.5)
    return rows @ (orthogonal(16, 0) * torch.arange(1, 17, dtype=F64) ** -0.5)


def test_different_widths_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 features against 4.*recompute the reference"):
        frechet_distance(
            Moments(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)),
            Moments(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64)),
        )
