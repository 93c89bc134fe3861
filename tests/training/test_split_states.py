"""The state of a run with split weights: what it asks of the sharding, which is played here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import BATCH, Given, phase
from torch import Tensor, nn

from cmbench.plugin.config import EMAConfig, OptimizerConfig
from cmbench.plugin.method import Objective, Phase
from cmbench.training.loop import counted_networks
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState


class FirstRows:
    """Plays one of two processes, which has the first row of each matrix and all of the rest."""

    hosts_wait = True

    def __init__(self, leads: bool = True) -> None:
        self.world = SimpleNamespace(leads=leads)
        self.splits: list[tuple[set[str], bool]] = []
        self.forgotten: list[list[nn.Module]] = []

    def split(self, modules: dict[str, nn.Module], *, compiled: bool) -> None:
        self.splits.append((set(modules), compiled))

    @staticmethod
    def slices(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        return [nn.Parameter(p.detach()[:1]) if p.ndim == 2 else p for p in parameters]

    @staticmethod
    def slice_of(whole: Tensor, like: Tensor) -> Tensor:
        return whole[:1] if like.ndim == 2 and whole.shape == like.shape else whole

    @staticmethod
    def whole_of(mine: Tensor, like: Tensor) -> Tensor:
        split = like.ndim == 2 and mine.shape == like[:1].shape
        return torch.cat([mine, mine + 100]) if split else mine

    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        return tensor

    @staticmethod
    def mixed() -> AbstractContextManager[None]:
        return nullcontext()

    def forget_passes(self, modules: Iterable[nn.Module]) -> None:
        self.forgotten.append(list(modules))

    @staticmethod
    def slice_gradients(parameters: Sequence[nn.Parameter], slices: Sequence[Tensor]) -> None:
        for parameter, mine in zip(parameters, slices, strict=True):
            if parameter is not mine:
                mine.grad = None if parameter.grad is None else parameter.grad[:1]

    @staticmethod
    def total_norm(parameters: Sequence[nn.Parameter], slices: Sequence[Tensor]) -> Tensor:
        return torch.tensor(7.0)


def tied() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[1].weight = module[0].weight
    return module


def made(sharding: Any, module: nn.Module | None = None) -> TrainingState:
    modules = {"model": module or tied(), "other": nn.Linear(2, 2)}
    recipe = phase(trains=("model", "other"), ema=(EMAConfig(decay=0.5),))
    return TrainingState(Given(recipe), modules, sharding)


def stepped(state: TrainingState) -> None:
    """One optimizer step of gradients that are all one, and of the average."""
    objective = state.phase.objectives[0]
    for parameter in state.parameters(objective):
        parameter.grad = torch.ones_like(parameter)
    state.slice_gradients(objective)
    state.optimizers[0].step()
    state.averages[0].update(batch_size=BATCH, nimg=BATCH)


def test_optimizer_and_average_see_slices() -> None:
    state = made(FirstRows())
    state.enter(0)
    objective = state.phase.objectives[0]
    moved = state.moved(objective)
    assert [tuple(p.shape) for p in moved] == [(1, 2), (2,), (2,), (2,), (2,), (1, 2), (2,)]
    assert state.moved(objective) is moved, "the optimizer's own, made once"
    assert state.optimizers[0].param_groups[0]["params"] == moved
    matrices = [p for p in state.parameters(objective) if p.ndim == 2]
    whole = state.whole_parameters(objective)
    assert len(whole) == len(moved) - len(matrices)
    assert all(p.ndim == 1 for p in whole)
    assert tuple(state.averages[0].average[0].shape) == (1, 2)
    with pytest.raises(AssertionError):
        state.tensors()


def test_norms_are_the_sharding_s_and_gradients_are_forgotten_on_both_sides() -> None:
    sharding = FirstRows()
    state = made(sharding)
    state.enter(0)
    objective = state.phase.objectives[0]
    assert state.gradient_norm(objective) is None
    stepped(state)
    assert state.gradient_norm(objective) == torch.tensor(7.0)
    state.zero_gradients(0, objective)
    assert sharding.forgotten == [list(state.modules.values())]
    both = [*state.parameters(objective), *state.moved(objective)]
    assert all(parameter.grad is None for parameter in both)


@pytest.mark.parametrize("leads", [True, False])
def test_only_the_leader_gathers_and_only_in_the_block(leads: bool) -> None:
    state = made(FirstRows(leads))
    state.enter(0)
    stepped(state)
    with state.gathered():
        tensors = state.tensors()
        assert bool(tensors) == leads
        if leads:
            assert tensors["optimizer.0.0.exp_avg"].shape == (2, 2)
            assert tensors["ema.0.model.1.weight"].shape == (2, 2)
            assert (
                tensors["ema.0.model.0.weight"][1, 0] == tensors["ema.0.model.0.weight"][0, 0] + 100
            )
            before = tensors["nets.model.0.weight"].clone()
            with torch.no_grad():
                state.modules["model"][0].weight.add_(1.0)  # type: ignore[index, operator]
            assert torch.equal(state.tensors()["nets.model.0.weight"], before), "a copy"
            assert (
                state.averaged(0).keys()
                == dict(state.sampled.named_parameters(remove_duplicate=False)).keys()
            )
    with pytest.raises(AssertionError, match="exist in `gathered` only"):
        state.tensors()


def test_what_was_gathered_is_sliced_again() -> None:
    first = made(FirstRows())
    first.enter(0)
    stepped(first)
    with first.gathered():
        tensors, meta = first.tensors(), first.meta()
    sharding = FirstRows()
    second = made(sharding)
    second.load(tensors, meta, compiled=True)
    assert sharding.splits == [({"model", "other"}, True)]
    second.split(compiled=False)
    assert len(sharding.splits) == 1, "once"
    for ours, theirs in zip(second.averages[0].average, first.averages[0].average, strict=True):
        assert torch.equal(ours, theirs)
    moments = zip(second.moved(second.phase.objectives[0]), first.moved(first.phase.objectives[0]))
    for ours, theirs in moments:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(
                second.optimizers[0].state[ours][name], first.optimizers[0].state[theirs][name]
            )


@pytest.mark.parametrize("compiled", [True, False])
def test_networks_are_split_before_they_are_wrapped_and_compiled_once(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped: list[tuple[Any, ...]] = []
    monkeypatch.setattr("cmbench.training.loop.CountedNetwork", lambda *a: wrapped.append(a))
    for sharding in (FirstRows(), None):
        wrapped.clear()
        state = made(sharding)
        counted_networks(state, Settings(0, BATCH, precision="bf16", compile=compiled))
        if sharding is not None:
            assert sharding.splits == [({"model", "other"}, compiled)]
        whole = compiled and sharding is None
        assert wrapped == [(m, "bf16", whole, None) for m in state.modules.values()]
        assert not state.scales_loss


def test_modules_of_other_objectives_are_not_mixed_up() -> None:
    """Parameters and slices are remembered by the modules that an objective trains."""
    modules = {"model": nn.Linear(2, 2), "other": nn.Linear(2, 2)}

    def loss(*_: Any) -> Tensor:
        raise NotImplementedError

    names: tuple[tuple[str, ...], ...] = (("model",), ("other",), ("other", "model"))
    objectives = tuple(Objective(loss, trains, OptimizerConfig()) for trains in names)
    state = TrainingState(Given(Phase("all", BATCH, objectives, ())), modules, FirstRows())  # type: ignore[arg-type]
    state.enter(0)
    expected = [[p for name in trains for p in modules[name].parameters()] for trains in names]
    assert [state.parameters(o) for o in objectives] == expected
    assert [len(state.moved(o)) for o in objectives] == [2, 2, 4]


def test_a_norm_leaves_out_what_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmbench.training.sharding import Sharding

    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    used, unused = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    used.grad = torch.tensor([3.0, 4.0])
    assert Sharding.total_norm([used, unused], [used, unused]) == 5.0
    assert Sharding.total_norm([unused], [unused]) == 0.0
