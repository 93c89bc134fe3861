from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics import precision_recall as module
from cmbench.metrics.precision_recall import precision_recall, reference_radii


def rows(count: int, dim: int, seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + offset


def by_definition(fake: Tensor, real: Tensor, k: int) -> tuple[float, float, float, float]:
    """Return the four numbers from full float64 distance matrices, straight from the papers."""
    real_radii = torch.cdist(real.double(), real.double()).kthvalue(k + 1).values
    fake_radii = torch.cdist(fake.double(), fake.double()).kthvalue(k + 1).values
    cross = torch.cdist(fake.double(), real.double())
    inside = cross <= real_radii[None]
    return (
        float(inside.any(1).double().mean()),
        float((cross <= fake_radii[:, None]).any(0).double().mean()),
        float(inside.sum(1).double().mean() / k),
        float(inside.any(0).double().mean()),
    )


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(5, 60),
    m=st.integers(5, 60),
    k=st.integers(1, 4),
    block=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_blocks_change_nothing(n: int, m: int, k: int, block: int, seed: int) -> None:
    fake, real = rows(n, 6, seed, 1.2, 0.3), rows(m, 6, seed + 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        result = precision_recall(fake, real, k=k)
    found = (result.precision, result.recall, result.density, result.coverage)
    assert found == pytest.approx(by_definition(fake, real, k), abs=1e-12)


def test_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    fake, real = rows(400, 20, 0, 1.1, 0.2), rows(500, 20, 1)
    theirs = prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=128, save_cpu_ram=False, verbose=False
    )
    ours = precision_recall(fake, real, k=3)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)
    assert ours.precision != ours.recall


def test_a_far_common_offset_flips_no_decision() -> None:
    """Without centring, float32 distances would lose their digits out there."""
    fake, real = rows(300, 16, 2, 1.1), rows(300, 16, 3)
    near, far = precision_recall(fake, real), precision_recall(fake + 4096, real + 4096)
    assert abs(near.precision - far.precision) <= 1 / 300
    assert abs(near.recall - far.recall) <= 1 / 300


def test_swapping_the_sets_swaps_precision_and_recall() -> None:
    a, b = rows(200, 8, 4, 0.5), rows(200, 8, 5)
    forward, backward = precision_recall(a, b), precision_recall(b, a)
    assert forward.precision == pytest.approx(backward.recall)
    assert forward.recall == pytest.approx(backward.precision)
    assert forward.precision > forward.recall, "a narrow generator is precise and forgets"


def test_equal_and_disjoint_sets() -> None:
    a = rows(100, 8, 6)
    same = precision_recall(a, a)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    apart = precision_recall(a, a + 1000)
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)


def test_cached_radii_give_the_same_result() -> None:
    fake, real = rows(90, 8, 7), rows(110, 8, 8)
    cached = precision_recall(fake, real, reference_radii=reference_radii(real))
    assert cached == precision_recall(fake, real)


def test_too_few_samples_are_named() -> None:
    with pytest.raises(UserError, match="3 samples; allowed: more than k = 3"):
        precision_recall(rows(3, 4, 0), rows(10, 4, 1))
