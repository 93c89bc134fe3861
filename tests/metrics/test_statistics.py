from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics.statistics import FeatureStatistics, Moments


def features(count: int, dim: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + offset


def assert_equal_statistics(a: FeatureStatistics, b: FeatureStatistics, rtol: float) -> None:
    assert a.count == b.count
    scale = float(b.mean.abs().max())
    assert float((a.mean - b.mean).abs().max()) <= rtol * scale
    assert float((a.m2 - b.m2).abs().max()) <= rtol * float(b.m2.abs().max())


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=8),
    seed=st.integers(0, 1000),
    offset=st.sampled_from([0.0, 3.0, 100.0]),
)
def test_any_division_into_batches_and_parts_equals_one_pass(
    cuts: list[int], seed: int, offset: float
) -> None:
    rows = features(200, 5, seed, offset)
    whole = FeatureStatistics.from_features(rows)
    edges = [0, *sorted(cuts), 200]
    parts = []
    for start, stop in pairwise(edges):
        part = FeatureStatistics(5)
        part.update(rows[start : (start + stop) // 2])
        part.update(rows[(start + stop) // 2 : stop])
        parts.append(part)
    assert_equal_statistics(FeatureStatistics.merged(parts), whole, 1e-12)
    assert_equal_statistics(FeatureStatistics.merged(parts[::-1]), whole, 1e-12)


def test_equals_numpy_covariance() -> None:
    rows = features(300, 7)
    moments = FeatureStatistics.from_features(rows).moments()
    np.testing.assert_allclose(moments.cov, np.cov(rows.numpy(), rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(moments.mean, rows.numpy().mean(0), rtol=1e-12, atol=1e-15)
    biased = FeatureStatistics.from_features(rows).moments("n")
    np.testing.assert_allclose(biased.cov, np.cov(rows.numpy(), rowvar=False, ddof=0), rtol=1e-12)
    assert (moments.divisor, biased.divisor, moments.count) == ("n-1", "n", 300)


def test_a_large_mean_costs_no_digits_of_the_covariance() -> None:
    """One-pass float64 sums of squares would keep about four digits here."""
    rows = features(1000, 3)
    shifted = FeatureStatistics(3)
    for batch in (rows + 2.0**20).split(37):
        shifted.update(batch)
    plain = FeatureStatistics.from_features(rows)
    assert float((shifted.cov - plain.cov).abs().max()) < 1e-9


def test_rank_bound_is_that_of_the_samples() -> None:
    assert FeatureStatistics.from_features(features(4, 9)).moments().rank_bound == 3
    assert FeatureStatistics.from_features(features(40, 9)).moments().rank_bound == 9
    assert Moments(torch.zeros(9), torch.eye(9)).rank_bound == 9


def test_float16_and_float32_rows_are_summed_in_float64() -> None:
    rows = features(500, 4).half()
    assert_equal_statistics(
        FeatureStatistics.from_features(rows), FeatureStatistics.from_features(rows.double()), 0
    )


def test_file_round_trip_is_exact(tmp_path: Path) -> None:
    statistics = FeatureStatistics.from_features(features(50, 6))
    statistics.save(tmp_path / "s.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "s.safetensors")
    assert_equal_statistics(loaded, statistics, 0)
    assert loaded.sha256 == statistics.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_damaged_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    FeatureStatistics.from_features(features(50, 6)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-8], b"", b"not safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"s\.safetensors: cannot be read.*delete the file"):
            FeatureStatistics.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match its hash"):
        FeatureStatistics.load(path)
    with pytest.raises(UserError, match="no such file"):
        FeatureStatistics.load(tmp_path / "absent.safetensors")


def test_errors_name_shape_and_cause() -> None:
    statistics = FeatureStatistics(4)
    with pytest.raises(UserError, match=r"\(3, 5\); allowed: \[N, 4\]"):
        statistics.update(torch.zeros(3, 5))
    bad = torch.zeros(3, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite features after 0 samples"):
        statistics.update(bad)
    assert statistics.count == 0
    statistics.update(torch.zeros(0, 4))
    statistics.update(torch.zeros(1, 4))
    with pytest.raises(UserError, match="1 samples; allowed: at least 2"):
        statistics.moments()
    with pytest.raises(UserError, match="5 features; allowed: 4"):
        statistics.merge(FeatureStatistics(5))
    with pytest.raises(UserError, match=r"allowed: \[D\] and \[D, D\]"):
        Moments(torch.zeros(3), torch.eye(4))
    with pytest.raises(NonFiniteError):
        Moments(torch.full((3,), torch.inf), torch.eye(3))
