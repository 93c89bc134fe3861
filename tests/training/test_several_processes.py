"""Two processes over gloo are one process that accumulates the same shards."""

from __future__ import annotations

import math
import os
import socket
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_trainer import BATCH, Feed, Given, Net, phase
from torch import nn

from cmbench.errors import BusyError, MissingError, NonFiniteError, UserError
from cmbench.plugin.config import OptimizerConfig
from cmbench.plugin.method import Batch
from cmbench.sweep.context import choose_device
from cmbench.training.distributed import World, joined
from cmbench.training.launch import Launch
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState

SHARD = 2
#: SGD-like: Adam turns a rounding difference of a tiny gradient into a whole step.
SMOOTH = OptimizerConfig(lr=0.01, eps=1.0)


def new_state(images: int = 4 * BATCH) -> TrainingState:
    return TrainingState(Given(phase(images=images, optimizer=SMOOTH)), {"model": Net(0.25)})


def trained(
    world: World,
    feed: Feed | None = None,
    stop_at: int | None = None,
    state: TrainingState | None = None,
) -> tuple[TrainingState, str | None]:
    state = state or new_state()

    def should_stop() -> str | None:
        mine = world.rank == world.size - 1  # one process is told; all must stop
        return "told" if mine and stop_at is not None and state.seen_nimg >= stop_at else None

    settings = Settings(
        seed=3, batch_size=BATCH, microbatch_size=SHARD, world=world, log_seconds=0.0
    )
    stopped = Trainer(state, feed or Feed(), settings, Watchers(should_stop=should_stop)).train()
    return state, stopped


class BadFeed(Feed):
    """Image 13 is NaN: it is in the second process's half of the second batch."""

    def batch(self, start: int, count: int, seed: int) -> Batch:
        batch = super().batch(start, count, seed)
        if start <= 13 < start + count:
            batch.images[13 - start] = math.nan
        return batch


def busy() -> None:
    raise BusyError("run x", "another process is training it", remedy="wait")


def uneven_gradients(world: World) -> list[float | None]:
    """Sum gradients of three parameters: used by the first process, by both, by none."""
    used = [[1.0, 10.0, None], [None, 20.0, None]][world.rank]
    parameters = [nn.Parameter(torch.zeros(())) for _ in used]
    for parameter, gradient in zip(parameters, used, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    world.sum_gradients(parameters, world.flat_gradients(parameters))
    return [None if p.grad is None else float(p.grad) for p in parameters]


def scenarios(world: World) -> dict[str, Any]:
    feed = Feed()
    state, _ = trained(world, feed)
    found: dict[str, Any] = {
        "asked": feed.asked,
        "evaluations": state.network_evaluations,
        "weight": float(state.modules["model"].weight.detach()),
    }
    half, reason = trained(world, stop_at=2 * BATCH)
    found["stopped"], found["stopped_at"] = reason, half.seen_nimg
    found["half"] = {k: v.detach().numpy() for k, v in half.tensors().items()}, half.meta()
    for name, call in {
        "nan": lambda: trained(world, BadFeed()),
        "busy": lambda: world.lead(busy),
    }.items():
        try:
            call()
        except UserError as error:
            found[name] = type(error).__name__, str(error)
    found["uneven"] = uneven_gradients(world)
    found["led"] = world.lead(lambda: {"answer": 42})
    found["flags"] = world.agree(world.rank == 1, False)
    return found


def child(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with joined(Launch(rank, 2, rank, 2), torch.device("cpu")) as world:
        pipe.send(scenarios(world))


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    trained(World())  # what torch imports at the first step, the children inherit
    fork = get_context("fork")
    pipes, processes = [], []
    for rank in range(2):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=child, args=(rank, port, there)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        found = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    return found


def test_same_images_and_weights_as_one_process(two: list[dict[str, Any]]) -> None:
    feed = Feed()
    state, _ = trained(World(), feed)
    assert sorted(two[0]["asked"] + two[1]["asked"]) == sorted(feed.asked)
    assert not set(two[0]["asked"]) & set(two[1]["asked"])
    weight = float(state.modules["model"].weight.detach())
    assert two[0]["weight"] == two[1]["weight"] == pytest.approx(weight, abs=1e-6)
    assert weight != 1.0
    assert two[0]["evaluations"] == two[1]["evaluations"] == state.network_evaluations


def test_a_stop_of_one_process_stops_both_and_one_process_resumes(
    two: list[dict[str, Any]],
) -> None:
    assert [f["stopped"] for f in two] == ["stopped by another process", "told"]
    assert [f["stopped_at"] for f in two] == [2 * BATCH] * 2
    tensors, meta = two[0]["half"]
    state = new_state()
    state.load({k: torch.as_tensor(v) for k, v in tensors.items()}, meta)
    trained(World(), state=state)
    straight, _ = trained(World())
    assert float(state.modules["model"].weight.detach()) == pytest.approx(
        float(straight.modules["model"].weight.detach()), abs=1e-6
    )
    assert state.network_evaluations == straight.network_evaluations


def test_a_parameter_that_one_process_did_not_use_gets_the_others_gradient(
    two: list[dict[str, Any]],
) -> None:
    assert two[0]["uneven"] == two[1]["uneven"] == [1.0, 30.0, None]


def test_nan_in_one_process_stops_both_with_the_same_line(two: list[dict[str, Any]]) -> None:
    assert two[0]["nan"] == two[1]["nan"]
    kind, line = two[0]["nan"]
    assert kind == NonFiniteError.__name__
    assert f"loss is not finite at {BATCH} images seen" in line


def test_what_the_leader_raises_and_returns_reaches_all(two: list[dict[str, Any]]) -> None:
    assert two[0]["busy"] == two[1]["busy"]
    assert two[1]["busy"] == ("BusyError", "run x: another process is training it; wait")
    assert two[0]["led"] == two[1]["led"] == {"answer": 42}
    assert two[0]["flags"] == two[1]["flags"] == (True, False)


def test_one_process_agrees_with_itself() -> None:
    assert World().agree(True, False) == (True, False)
    assert World().lead(lambda: 3) == 3
    with pytest.raises(BusyError):
        World().lead(busy)


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"batch_size: 8 images do not split evenly over 3 process"):
        list(World(0, 3).shards(BATCH, None))


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two'; allowed: 1 to"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: '2'; allowed: 0 to 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 without RANK; start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "LOCAL_RANK: missing for process 1 of 2: all of"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK: '-1'"),
    ],
)
def test_bad_environment(
    variables: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line):
        Launch.from_environment()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_under_way_is_given_up_only_after_an_error(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's farewell waits for all that was begun, and others may never come for it."""
    calls: list[str] = []
    group = SimpleNamespace(abort=lambda: calls.append("abort"))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=group))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))

    def block() -> None:
        with joined(Launch(1, 2, 1, 2), torch.device("cuda")):
            if fails:
                raise NonFiniteError("loss", "is not finite")

    if fails:
        with pytest.raises(NonFiniteError):
            block()
    else:
        block()
    assert calls == (["abort", "destroy"] if fails else ["destroy"])


def test_place_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(0, 1, 0, 1)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Launch.from_environment() == Launch(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("visible", "count", "device"),
    [("7", 1, "cuda:0"), ("0,1,2,3", 4, "cuda:3"), (None, 4, "cuda:3"), (None, 1, None)],
)
def test_the_gpu_of_a_process(
    visible: str | None, count: int, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if device is None:
        with pytest.raises(MissingError, match=r"'cuda:3': torch sees 1 CUDA device"):
            choose_device("auto", 3)
    else:
        assert choose_device("auto", 3) == torch.device(device)
