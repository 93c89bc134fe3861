"""Training with ``torch.compile`` is training without it, through the loop, by a real compiler."""

from __future__ import annotations

import shutil

import pytest
import torch
from method_kit import build, context

from cmbench.training.augment import DatasetFeed
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings

BATCH, STEPS = 8, 2
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU",
)


def weights_after(name: str, dataset: str, *, compiled: bool, device: str = "cpu") -> torch.Tensor:
    """Train a few steps with Adam's eps large, so that rounding stays rounding."""
    torch._dynamo.reset()
    optimizer = {"name": "adam", "lr": 0.05, "eps": 1.0}
    case = build(name, dataset, batch_size=BATCH, optimizer=optimizer)
    for module in case.modules.values():
        module.to(device)
    if case.teacher is not None and case.teacher.network is not None:
        case.teacher.network.to(device)
    state = case.state()
    settings = Settings(seed=0, batch_size=BATCH, compile=compiled)
    feed = DatasetFeed(context().dataset(dataset).to(device), case.plan.config)
    trainer = Trainer(state, feed, settings)
    state.enter(0)
    before = flat(state)
    for _ in range(STEPS):
        trainer.train_step()
    after = flat(state)
    assert float((after - before).norm()) > 1e-3
    return after - before


def flat(state: object) -> torch.Tensor:
    parameters = state.modules["model"].parameters()  # type: ignore[attr-defined]
    return torch.cat([p.detach().cpu().flatten().clone() for p in parameters])


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_eager_steps() -> None:
    """One method whose step has a graded pass and a carried tangent, through the C++ compiler."""
    eager = weights_after("sct", "gmm", compiled=False)
    compiled = weights_after("sct", "gmm", compiled=True)
    assert float((compiled - eager).norm() / eager.norm()) < 1e-4


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["edm", "ect", "sct", "scd", "cd"])
def test_compiled_steps_are_eager_steps_on_cuda(name: str) -> None:
    eager = weights_after(name, "digits", compiled=False, device="cuda")
    compiled = weights_after(name, "digits", compiled=True, device="cuda")
    assert float((compiled - eager).norm() / eager.norm()) < 1e-3
