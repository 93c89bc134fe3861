from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmbench.data.streams import ShuffledStream, epoch_flips, epoch_permutation

sizes = st.integers(1, 50)
seeds = st.integers(0, 2**63 - 1)

EXPECTED_ORDER = [0, 8, 2, 4, 5, 3, 1, 7, 9, 6]
EXPECTED_FLIPS = [1, 1, 1, 0, 1, 0, 0, 1, 0, 0]


@given(size=sizes, seed=seeds, epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_permutation(size, seed, epoch)) == list(range(size))


@given(size=sizes, seed=seeds, start=st.integers(0, 200), cuts=st.lists(st.integers(1, 40)))
def test_a_batch_is_made_of_smaller_batches(
    size: int, seed: int, start: int, cuts: list[int]
) -> None:
    whole = ShuffledStream(size).take(start, sum(cuts) + 1, seed)
    stream, parts = ShuffledStream(size), []
    for cut in [*cuts, 1]:
        parts.append(stream.take(start, cut, seed))
        start += cut
    assert torch.equal(whole.indices, torch.cat([p.indices for p in parts]))
    assert torch.equal(whole.flips, torch.cat([p.flips for p in parts]))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_permutation(40, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_positions_are_uniform() -> None:
    # Each image is equally likely at each place: chi-square over 2,000 permutations of five.
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), epoch_permutation(5, seed, 0)] += 1
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert chi2 < 45  # 16 degrees of freedom: p = 1e-4


def test_flips_are_fair_and_named() -> None:
    flips = epoch_flips(10_000, 1, 0)
    assert abs(flips.mean() - 0.5) < 0.02
    assert np.array_equal(flips, epoch_flips(10_000, 1, 0))
    assert not np.array_equal(flips, epoch_flips(10_000, 1, 1))


def test_the_order_never_changes() -> None:
    # Records name seeds: what a seed means must not depend on a library's version.
    assert epoch_permutation(10, 0, 0).tolist() == EXPECTED_ORDER
    assert epoch_flips(10, 0, 0).astype(int).tolist() == EXPECTED_FLIPS


@pytest.mark.cuda
def test_the_same_stream_on_the_gpu() -> None:
    device = torch.device("cuda")
    on_cpu = ShuffledStream(100).take(90, 30, 4)
    on_gpu = ShuffledStream(100, device).take(90, 30, 4)
    assert torch.equal(on_cpu.indices, on_gpu.indices.cpu())
    assert torch.equal(on_cpu.flips, on_gpu.flips.cpu())
