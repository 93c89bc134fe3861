"""fp16: the loss is scaled, steps that overflow are skipped, and the scale survives a restart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_trainer import BATCH, Feed, Given, Net, default_loss, phase, train, weight
from torch import Tensor, nn

from cmbench.errors import NonFiniteError
from cmbench.plugin.config import OptimizerConfig
from cmbench.training.loop import Trainer
from cmbench.training.optimizers import make_optimizer
from cmbench.training.scaling import LossScaler
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import OtherNetworkError, TrainingState

#: What torch's scaler begins with.
FIRST_SCALE = 65536.0


class Half(torch.autograd.Function):
    """The identity, whose gradient overflows where fp16's would: beyond ``limit``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        return torch.where(g.abs() > ctx.limit, torch.full_like(g, math.inf), g), None


def overflowing(limit: float) -> Any:
    return lambda *a: Half.apply(default_loss(*a), limit)


def optimizer(name: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, lr=0.01, eps=1e-3)


@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_overflowing_steps_are_skipped_and_the_scale_halves(name: Any) -> None:
    # d loss / d per-image value is scale / BATCH: three halvings until it fits.
    limit = FIRST_SCALE / BATCH / 8
    state = train(
        phase(overflowing(limit), images=3 * BATCH, optimizer=optimizer(name)), precision="fp16"
    )
    assert weight(state) == 1.0
    assert state.scaler(0).state_dict()["scale"] == FIRST_SCALE / 8
    longer = train(
        phase(overflowing(limit), images=5 * BATCH, optimizer=optimizer(name)), precision="fp16"
    )
    assert weight(longer) != 1.0
    assert longer.scaler(0).state_dict() | {"_growth_tracker": 2} == longer.scaler(0).state_dict()
    assert longer.scaler(0).state_dict()["scale"] == FIRST_SCALE / 8


def test_a_scaled_step_is_the_unscaled_step() -> None:
    """On a network that autocast leaves alone, scale and gradient clipping cancel exactly."""
    config = OptimizerConfig(lr=0.01, eps=1e-3, grad_clip=0.02)
    scaled = train(phase(optimizer=config), precision="fp16")
    plain = train(phase(optimizer=config), precision="fp32")
    assert weight(scaled) == pytest.approx(weight(plain), abs=1e-7)
    assert weight(plain) != 1.0


def test_what_overflows_at_any_scale_stops_the_run() -> None:
    with pytest.raises(NonFiniteError, match=f"gradient is not finite at {16 * BATCH} images seen"):
        train(phase(overflowing(0.0), images=40 * BATCH), precision="fp16")


def test_a_loss_that_is_not_finite_stops_at_once() -> None:
    with pytest.raises(NonFiniteError, match="loss is not finite at 0 images seen"):
        train(phase(lambda *a: default_loss(*a) * math.inf), precision="fp16")


def test_the_scale_is_logged_and_survives_a_restart() -> None:
    loss = overflowing(FIRST_SCALE / BATCH / 4)
    seen: list[float] = []

    def new() -> TrainingState:
        return TrainingState(Given(phase(loss, images=6 * BATCH)), {"model": Net()})

    def go(state: TrainingState, stop_at: int) -> None:
        watchers = Watchers(
            log=lambda _, scalars: seen.append(scalars.get("loss_scale", math.nan)),
            should_stop=lambda: "told" if state.seen_nimg >= stop_at else None,
        )
        settings = Settings(seed=3, batch_size=BATCH, precision="fp16", log_seconds=0.0)
        Trainer(state, Feed(), settings, watchers).train()

    straight = new()
    go(straight, 10**9)
    assert seen[:4] == [FIRST_SCALE, FIRST_SCALE / 2, FIRST_SCALE / 4, FIRST_SCALE / 4]
    first = new()
    go(first, 3 * BATCH)
    again = new()
    again.load({k: v.clone() for k, v in first.tensors().items()}, first.meta())
    assert again.meta()["loss_scalers"] == first.meta()["loss_scalers"], "not lost without a step"
    go(again, 10**9)
    assert weight(again) == weight(straight)
    assert again.meta()["loss_scalers"] == straight.meta()["loss_scalers"]


def one_step(
    name: Any, loss_factor: float, monkeypatch: pytest.MonkeyPatch, theirs: float
) -> tuple[float, float]:
    """A step of one of two processes on its slice; ``theirs``: whether the other overflowed."""

    def all_reduce(bad: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        other = torch.full_like(bad, theirs)
        bad.copy_(torch.maximum(bad, other) if op == dist.ReduceOp.MAX else bad + other)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    mine = nn.Parameter(torch.ones(2))
    optimizer_of_mine = make_optimizer(OptimizerConfig(name=name, lr=0.1), [mine])
    scaler = LossScaler(torch.device("cpu"), True, several=True)
    scaler.scale(mine.sum() * loss_factor).backward()
    scaler.unscale_(optimizer_of_mine)
    scaler.step(optimizer_of_mine)
    scale = scaler.current()
    assert scale is not None
    return float(mine.detach()[0]), float(scale)


@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_a_step_is_skipped_in_every_process_if_one_or_both_overflow(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for factor, theirs in ((math.inf, 0.0), (1.0, 1.0), (math.inf, 1.0)):
        assert one_step(name, factor, monkeypatch, theirs) == (1.0, FIRST_SCALE / 2)
    moved, scale = one_step(name, 1.0, monkeypatch, 0.0)
    assert (moved, scale) == (pytest.approx(0.9), FIRST_SCALE)


def test_other_precisions_scale_nothing() -> None:
    for precision in ("fp32", "bf16"):
        state = train(phase(), precision=precision)
        assert "loss_scalers" not in state.meta()


@pytest.mark.cuda
def test_fp16_autocast_learns_on_cuda() -> None:
    class OnCuda(Feed):
        def batch(self, start: int, count: int, seed: int) -> Any:
            found = super().batch(start, count, seed)
            return type(found)(found.images.cuda(), None)

    def loss(nets: Any, batch: Any, draws: Any, progress: Any) -> Tensor:
        times = torch.zeros(len(batch.images), device="cuda")
        return (nets["model"](batch.images, times) - batch.images).square().flatten(1).sum(1)

    state = train(phase(loss), modules={"model": Net().cuda()}, feed=OnCuda(), precision="fp16")
    assert math.isfinite(weight(state))
    assert state.scaler(0).state_dict()["scale"] == FIRST_SCALE


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (
            Wider(),
            r"has another network as 'model': 1 tensors differ, the first is weight, "
            r"\(\) there and \(2,\) here",
        ),
        (nn.Linear(1, 1), r"2 tensors differ, the first is bias, missing there and \(1,\) here"),
    ],
)
def test_a_checkpoint_of_another_network(module: nn.Module, line: str) -> None:
    saved = train(phase())
    other = TrainingState(Given(phase()), {"model": module})
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(OtherNetworkError, match=line) as caught:
        other.load(saved.tensors(), saved.meta())
    assert "\n" not in str(caught.value)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
