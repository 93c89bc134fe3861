"""Randomness of training steps: named, stateless, and the same for any split over processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmbench.training.distributed import World
from cmbench.training.randomness import RandomState, StepDraws, replayed, seed_global
from cmbench.training.resident import resident

LIKE = torch.empty(4, 1, 2, 2)


def test_a_name_gives_the_same_numbers_again_and_names_differ() -> None:
    draws = StepDraws(1, 64)
    first = draws.normal("noise", LIKE)
    assert draws.normal("noise", LIKE) is first
    assert torch.equal(StepDraws(1, 64).normal("noise", LIKE), first)
    for other in (StepDraws(2, 64), StepDraws(1, 68)):
        assert not torch.equal(other.normal("noise", LIKE), first)
    assert not torch.equal(draws.normal("else", LIKE), first)


def test_the_order_of_draws_does_not_matter() -> None:
    a, b = StepDraws(1, 0), StepDraws(1, 0)
    a.normal("noise", LIKE)
    assert torch.equal(a.uniform("time", LIKE[:, 0, 0, 0]), b.uniform("time", LIKE[:, 0, 0, 0]))


def test_one_name_never_means_two_draws() -> None:
    draws = StepDraws(1, 0)
    draws.normal("noise", LIKE)
    with pytest.raises(ValueError, match=r"'noise' was normal .* now uniform .* another name"):
        draws.uniform("noise", LIKE)
    with pytest.raises(ValueError, match=r"shape \(4, 1, 2, 2\), now normal of shape \(4,\)"):
        draws.normal("noise", LIKE[:, 0, 0, 0])


def test_numbers_do_not_depend_on_strides() -> None:
    x = torch.empty(2, 3, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(StepDraws(1, 0).normal("n", x), StepDraws(1, 0).normal("n", last))


def test_distributions() -> None:
    like = torch.empty(20_000)
    normal, uniform = StepDraws(3, 0).normal("n", like), StepDraws(3, 0).uniform("u", like)
    # six standard errors
    assert abs(float(normal.mean())) < 6 / 141.4
    assert abs(float(normal.std()) - 1) < 6 / 200
    assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 6 * 0.2887 / 141.4


def test_global_seed_comes_from_names() -> None:
    seed_global(1, "dropout", 5)
    first = torch.rand(3)
    torch.rand(100)
    seed_global(1, "dropout", 5)
    assert torch.equal(torch.rand(3), first)


def test_replayed_randomness_is_drawn_again_and_then_forgotten() -> None:
    seed_global(1)
    snapshot = RandomState.of(torch.device("cpu"))
    first, second = torch.rand(3), torch.rand(3)
    seed_global(1)
    assert torch.equal(torch.rand(3), first)
    with replayed(snapshot):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), second)


def test_the_generator_of_a_gpu_is_saved_and_restored_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [torch.tensor([i]) for i in range(3)]
    calls: list[tuple[str, object, object]] = []

    def get(device: torch.device) -> torch.Tensor:
        calls.append(("get", device, None))
        return states[len(calls) - 1]

    monkeypatch.setattr(torch.cuda, "get_rng_state", get)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: calls.append(("set", device, state))
    )
    gpu = torch.device("cuda:1")
    before = torch.get_rng_state()
    snapshot = RandomState.of(gpu)
    with replayed(snapshot):
        assert calls == [("get", gpu, None), ("get", gpu, None), ("set", gpu, states[0])]
    assert calls[3:] == [("set", gpu, states[1])]
    assert torch.equal(torch.get_rng_state(), before), "the CPU's is left alone"


def test_numbers_are_made_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    generator = torch.Generator

    def on(device: torch.device) -> torch.Generator:
        made.append(device)
        return generator()  # there is none for the meta device

    monkeypatch.setattr(torch, "Generator", on)
    like = torch.empty(2, 3, device="meta", dtype=torch.float16)
    found = StepDraws(1, 0).normal("noise", like)
    assert made == [like.device]
    assert (found.device, found.dtype, found.shape) == (like.device, like.dtype, like.shape)


def test_tables_that_stay_on_a_device_are_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the default device is: a copy from page-locked memory need not wait."""
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    made: list[int] = []

    def table(count: int) -> torch.Tensor:
        made.append(count)
        return torch.arange(float(count))

    like = torch.empty(1, device="meta")
    with torch.device("meta"):
        first = resident(table, 3, like=like, dtype=torch.float64)
        again = resident(table, 3, like=like, dtype=torch.float64)
        resident(table, 4, like=like)
    assert again is first
    assert made == [3, 4]
    assert [(t.device.type, t.dtype) for t in pinned] == [
        ("cpu", torch.float64),
        ("cpu", torch.float32),
    ]
    assert (first.device.type, first.dtype) == ("meta", torch.float64)
    assert resident(table, 2, like=torch.empty(1)).tolist() == [0.0, 1.0]
    assert resident(table, 2, like=torch.empty(1), dtype=torch.float16).dtype == torch.float16


@given(size=st.integers(1, 8), shard=st.integers(1, 8), per_rank=st.integers(1, 5))
def test_processes_together_see_the_shards_of_one(size: int, shard: int, per_rank: int) -> None:
    batch = size * shard * per_rank
    alone = list(World().shards(batch, shard))
    together = [s for rank in range(size) for s in World(rank, size).shards(batch, shard)]
    assert together == alone
    assert [first for first, _ in alone] == list(range(0, batch, shard))
    assert sum(count for _, count in alone) == batch


@pytest.mark.parametrize(("batch", "size", "shard"), [(10, 3, None), (12, 2, 4), (7, 1, 2)])
def test_a_batch_that_does_not_split_is_one_clear_line(
    batch: int, size: int, shard: int | None
) -> None:
    with pytest.raises(Exception, match=f"{batch} images do not split evenly over {size} process"):
        list(World(0, size).shards(batch, shard))
