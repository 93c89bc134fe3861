"""Continuous-time training by two processes over gloo: the derivative survives, nothing changes."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from method_kit import build, stir
from torch import Tensor

from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Batch
from cmbench.training.distributed import World, joined
from cmbench.training.launch import Launch
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
BATCH, SHARD, STEPS = 8, 2, 2
#: Adam turns the rounding of a tiny gradient into a whole step, unless eps is large.
SMOOTH = {"name": "adam", "lr": 0.05, "eps": 1.0}


@dataclass(frozen=True)
class Scenario:
    method: str
    dataset: str = "digits"
    dropout: float = 0.0
    checkpointing: bool = False
    compiled: bool = False


SCENARIOS = {
    "checkpointed": Scenario("sct", checkpointing=True),
    "distilled": Scenario("scd"),
    "compiled": Scenario("sct", "gmm", compiled=True),
    "compiled, no tangent": Scenario("ict", "gmm", compiled=True),
    "dropout": Scenario("sct", dropout=0.2),
}
Results = tuple[dict[str, Any], list[dict[str, Any]]]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU",
)


class Feed:
    """Images by their position."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def batch(self, start: int, count: int, seed: int) -> Batch:
        generators = [torch.Generator().manual_seed(i) for i in range(start, start + count)]
        images = [torch.randn(self.shape, generator=g) / 2 for g in generators]
        return Batch(torch.stack(images).clamp(-1, 1), None)


class Watched(CountedNetwork):
    """Compares every derivative that training uses with float64 central differences."""

    errors: list[float]

    def forward_with_tangent(
        self, x: Tensor, c_noise: Tensor, dx: Tensor, dc_noise: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        out, tangent = super().forward_with_tangent(x, c_noise, dx, dc_noise, *args, **kwargs)
        with torch.no_grad():
            self.module.double()
            ahead, behind = (
                self.module(x.double() + h * dx.double(), c_noise.double() + h * dc_noise.double())
                for h in (1e-5, -1e-5)
            )
            self.module.float()
        expected = (ahead - behind) / 2e-5
        self.errors.append(float((tangent - expected).norm() / expected.norm()))
        return out, tangent


def trained(world: World, scenario: Scenario) -> dict[str, Any]:
    """Train a few steps; return weights, the last gradients, and the derivative's errors."""
    torch._dynamo.reset()
    network = {"dropout": scenario.dropout}
    warm = {} if scenario.method == "ict" else {"warmup_steps": 2}
    case = build(
        scenario.method,
        scenario.dataset,
        batch_size=BATCH,
        network=network,
        optimizer=SMOOTH,
        **warm,
    )
    stir({"model": case.modules["model"]}, 9, 0.3)  # curved: the derivative must matter
    model: Any = case.modules["model"]
    model.gradient_checkpointing = scenario.checkpointing
    state = case.state()
    settings = Settings(
        seed=0, batch_size=BATCH, microbatch_size=SHARD, world=world, compile=scenario.compiled
    )
    trainer = Trainer(state, Feed(case.data.data_shape), settings)
    errors: list[float] = []
    if not scenario.dropout and not scenario.compiled:
        trainer.nets["model"].__class__ = Watched
        trainer.nets["model"].errors = errors
    state.enter(0)
    before = flat([p.detach() for p in model.parameters()]).numpy()
    for _ in range(STEPS):
        trainer.train_step()
    return {
        "before": before,
        "weights": flat([p.detach() for p in model.parameters()]).numpy(),
        "gradient": flat([p.grad for p in model.parameters()]).numpy(),
        "errors": errors,
    }


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def child(rank: int, port: int, pipe: Connection, scenarios: Mapping[str, Scenario]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    with joined(Launch(rank, 2, rank, 2), torch.device("cpu")) as world:
        pipe.send({name: trained(world, scenario) for name, scenario in scenarios.items()})


def in_one_and_in_two(scenarios: Mapping[str, Scenario]) -> Results:
    """What one process and each of two find; one goes first."""
    alone = {name: trained(World(), scenario) for name, scenario in scenarios.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, pipes, processes = get_context("fork"), [], []
    for rank in range(2):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=child, args=(rank, port, there, scenarios)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        return alone, [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(30)
            process.kill()


@pytest.fixture(scope="module")
def results() -> Results:
    """What one process and each of two found; compiled is what autograd's compiler makes."""
    with pytest.MonkeyPatch.context() as patch:
        compiler: Callable[..., Any] = torch.compile
        patch.setattr(torch, "compile", partial(compiler, backend="aot_eager"))
        return in_one_and_in_two(SCENARIOS)


def relative(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(name: str, results: Results) -> None:
    assert_as_one(name, results)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_as_one_through_the_real_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One method whose step has a graded pass and a carried tangent, through the C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # shared by the processes
    # No pool before the fork. (monkeypatch would delete the setting at its end, not restore it.)
    with torch._inductor.config.patch(compile_threads=1):
        results = in_one_and_in_two({"sct": Scenario("sct", "gmm", compiled=True)})
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"
    assert_as_one("sct", results)


def assert_as_one(name: str, results: Results) -> None:
    alone, both = results
    for found in both:
        assert abs(found[name]["weights"] - alone[name]["weights"]).max() < 1e-6
        assert relative(found[name]["gradient"], alone[name]["gradient"]) < 1e-6
    assert (both[0][name]["weights"] == both[1][name]["weights"]).all()
    assert abs(alone[name]["weights"] - alone[name]["before"]).max() > 1e-3


@pytest.mark.parametrize("name", ["checkpointed", "distilled"])
def test_the_derivative_in_each_process_is_that_of_central_differences(
    name: str, results: Results
) -> None:
    alone, both = results
    assert len(alone[name]["errors"]) == STEPS * BATCH // SHARD
    for found in both:
        assert len(found[name]["errors"]) == STEPS * BATCH // SHARD // 2
        assert max(found[name]["errors"]) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_derivative_in_two_processes_is_the_uncompiled_one(results: Results) -> None:
    """A tangent that the compiler dropped would leave another gradient."""
    eager = trained(World(), Scenario("sct", "gmm"))
    assert max(eager["errors"]) < 1e-4
    for found in results[1]:
        assert relative(found["compiled"]["gradient"], eager["gradient"]) < 1e-5
