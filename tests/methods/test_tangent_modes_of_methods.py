"""The three ways to a derivative give the same training step; a wrong one would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_kit import build, progress, stir
from torch import Tensor

from cmbench.training.randomness import StepDraws

MODES = ("carried", "forward-ad", "finite-difference")


def gradient(name: str, dataset: str, dtype: torch.dtype, **options: Any) -> Tensor:
    """Return the gradient of a batch's loss, all parameters in one vector, in float64."""
    case = build(
        name, dataset, conditional=True, network={"dropout": 0.2}, warmup_steps=4, **options
    )
    stir({"model": case.modules["model"]}, 9, 0.3)  # curved: the derivative must matter
    for module in case.modules.values():
        module.to(dtype).train()
    if case.teacher is not None and case.teacher.network is not None:
        case.teacher.network.to(dtype)
    batch = case.batch()
    batch = type(batch)(batch.images.to(dtype), batch.labels)
    torch.manual_seed(1)
    loss = case.method.loss(case.nets, batch, Float32Draws(), progress(step=3))
    loss.sum().backward()
    return torch.cat([p.grad.double().flatten() for p in case.modules["model"].parameters()])


class Float32Draws:
    """The same numbers whatever the precision."""

    def normal(self, name: str, like: Tensor) -> Tensor:
        return StepDraws(0, 0).normal(name, like.float()).to(like)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        return StepDraws(0, 0).uniform(name, like.float()).to(like)


@pytest.mark.parametrize("dataset", ["digits", "gmm"])
@pytest.mark.parametrize("parameterization", ["trigflow", "edm"])
@pytest.mark.parametrize("name", ["sct", "scd"])
def test_modes_agree(name: str, parameterization: str, dataset: str) -> None:
    """In float64, at warm-up 3/4, under dropout: exact ones to rounding, differences to h^2."""
    teacher = "edm:smoke" if parameterization == "edm" else "edm:trigflow-smoke"
    options = {"parameterization": parameterization, "teacher": teacher}
    carried, forward, difference = (
        gradient(name, dataset, torch.float64, tangent_mode=mode, **options) for mode in MODES
    )
    size = carried.norm()
    assert float(size) > 0
    assert float((forward - carried).norm() / size) < 1e-10
    assert 1e-12 < float((difference - carried).norm() / size) < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_single_precision_is_close_to_double(mode: str) -> None:
    exact = gradient("sct", "digits", torch.float64)
    ours = gradient("sct", "digits", torch.float32, tangent_mode=mode)
    bound = 1e-3 if mode == "finite-difference" else 1e-5
    assert float((ours - exact).norm() / exact.norm()) < bound


def test_full_precision_of_the_derivative_is_an_option() -> None:
    ours = gradient("sct", "digits", torch.float32, tangent_dtype="fp32")
    assert torch.equal(ours, gradient("sct", "digits", torch.float32))


def test_a_forgotten_derivative_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile has dropped tangents without a word: the gradient then is another one."""
    exact = gradient("sct", "gmm", torch.float64)
    from cmbench_plugins import scm

    original = scm.rearranged_tangent
    monkeypatch.setattr(
        scm, "rearranged_tangent", lambda F, dF, *rest: original(F, torch.zeros_like(dF), *rest)
    )
    assert float((gradient("sct", "gmm", torch.float64) - exact).norm() / exact.norm()) > 0.03
