from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics._files import read_tensors, write_tensors
from cmbench.metrics.statistics import FeatureStatistics, Moments, moments_of


def features(count: int, dim: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + offset


def assert_equal_moments(a: Moments, b: Moments, rtol: float) -> None:
    assert a.count == b.count
    assert float((a.mean - b.mean).abs().max()) <= rtol * float(b.mean.abs().max())
    assert float((a.cov - b.cov).abs().max()) <= rtol * float(b.cov.abs().max())


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=8),
    seed=st.integers(0, 1000),
    offset=st.sampled_from([0.0, 3.0, 100.0]),
)
def test_any_division_into_batches_equals_one_pass(
    cuts: list[int], seed: int, offset: float
) -> None:
    rows = features(200, 5, seed, offset)
    parts = FeatureStatistics(5)
    for start, stop in pairwise([0, *sorted(cuts), 200]):
        parts.update(rows[start:stop])
    assert_equal_moments(parts.moments(), moments_of(rows), 1e-12)


def test_equals_numpy_covariance() -> None:
    rows = features(300, 7)
    moments = moments_of(rows)
    np.testing.assert_allclose(moments.cov, np.cov(rows.numpy(), rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(moments.mean, rows.numpy().mean(0), rtol=1e-12, atol=1e-15)
    assert (moments.divisor, moments.count) == ("n-1", 300)


def test_a_large_mean_costs_no_digits_of_the_covariance() -> None:
    """One-pass float64 sums of squares would keep about four digits here."""
    rows = features(1000, 3)
    shifted = FeatureStatistics(3)
    for batch in (rows + 2.0**20).split(37):
        shifted.update(batch)
    assert float((shifted.moments().cov - moments_of(rows).cov).abs().max()) < 1e-9


def test_rank_bound_is_that_of_the_samples() -> None:
    assert moments_of(features(4, 9)).rank_bound == 3
    assert moments_of(features(40, 9)).rank_bound == 9
    assert Moments(torch.zeros(9), torch.eye(9)).rank_bound == 9


def test_float16_and_float32_rows_are_summed_in_float64() -> None:
    rows = features(500, 4).half()
    assert_equal_moments(moments_of(rows), moments_of(rows.double()), 0)


def test_damaged_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_tensors(path, {"x": features(50, 6)}, {"kind": "numbers"})
    assert torch.equal(read_tensors(path, "numbers")[0]["x"], features(50, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"holds 'numbers'; allowed: kind 'others'; delete"):
        read_tensors(path, "others")
    for damaged in (whole[:100], whole[:-8], b"", b"not safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"s\.safetensors: cannot be read.*delete the file"):
            read_tensors(path, "numbers")
    with pytest.raises(UserError, match="does not exist"):
        read_tensors(tmp_path / "absent.safetensors", "numbers")


def test_tensors_of_files_begin_where_torchs_own_do(tmp_path: Path) -> None:
    """Last bits of matrix products depend on the alignment; files hold tensors at any byte."""
    parts = {f"part-{i}": torch.randn(3 + i, dtype=torch.float64) for i in range(9)}
    write_tensors(tmp_path / "s.safetensors", parts, {"kind": "numbers"})
    found, _ = read_tensors(tmp_path / "s.safetensors", "numbers")
    assert {tensor.data_ptr() % 64 for tensor in found.values()} == {0}


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
    with pytest.raises(UserError, match=r"allowed: \[D\] and \[D, D\]"):
        Moments(torch.zeros(3), torch.eye(4))
    with pytest.raises(NonFiniteError):
        Moments(torch.full((3,), torch.inf), torch.eye(3))
