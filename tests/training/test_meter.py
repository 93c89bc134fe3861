"""What the loop's meter reports, and when it refuses a number that is not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import BATCH, Given, Net, phase
from torch import Tensor

from cmbench.errors import NonFiniteError
from cmbench.plugin.method import Progress
from cmbench.training import meter as module
from cmbench.training.distributed import World
from cmbench.training.meter import Meter
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState


class Clock:
    """Stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def made(**settings: Any) -> tuple[Meter, TrainingState]:
    state = TrainingState(Given(phase(), phase(name="later")), {"model": Net()})
    state.enter(0)
    return Meter(state, Settings(3, BATCH, **settings)), state


def step(meter: Meter, clock: Clock | None = None, seconds: float = 0.0, **logged: float) -> None:
    progress = Progress(0, 4 * BATCH, 0, 4)
    for name, value in logged.items():
        progress.log(name, torch.tensor(value))
    if clock is not None:
        clock.now += seconds
    meter.see_step(progress, {})


def test_means_are_over_the_steps_that_logged_a_name(clock: Clock) -> None:
    meter, _ = made()
    for loss, norm in ((1.0, 3.0), (2.0, 5.0), (6.0, 7.0)):
        meter.see_loss(torch.tensor(loss))
        meter.see_gradient(torch.tensor(norm), torch.tensor(2.0**16))
        step(meter, clock, 0.5, **({"rare": 8.0} if loss == 2.0 else {}))
    assert meter.take() == {
        "loss": 3.0,
        "grad_norm": 5.0,
        "loss_scale": 2.0**16,
        "rare": 8.0,
        "images_per_s": 3 * BATCH / 1.5,
    }
    assert meter.take() == {}, "nothing is left of the interval before"
    meter.see_loss(torch.tensor(4.0))
    step(meter, clock, 2.0)
    assert meter.take() == {"loss": 4.0, "images_per_s": BATCH / 2.0}


def test_an_interval_that_took_no_time_has_a_finite_speed(clock: Clock) -> None:
    meter, _ = made()
    step(meter)
    assert meter.take() == {"images_per_s": pytest.approx(BATCH / 1e-9)}


def test_intervals_of_logging_and_saving_begin_anew(clock: Clock) -> None:
    meter, _ = made(log_seconds=2.0, checkpoint_seconds=5.0)
    found = []
    for _ in range(6):
        step(meter, clock, 1.0)
        found.append((meter.due(), meter.long_unsaved()))
        if meter.due():
            meter.take()
        if meter.long_unsaved():
            meter.saved()
    assert found == [
        (False, False),
        (True, False),
        (False, False),
        (True, False),
        (False, True),
        (True, False),
    ]


def test_seconds_are_counted_by_phase(clock: Clock) -> None:
    meter, state = made()
    step(meter, clock, 1.0)
    step(meter, clock, 2.0)
    state.enter(1)
    step(meter, clock, 4.0)
    assert state.seconds == {"train": 3.0, "later": 4.0}


def test_evaluations_are_those_of_all_processes_and_counted_once() -> None:
    meter, state = made(world=World(0, 3))
    net, teacher = SimpleNamespace(forward_equivalents=5), SimpleNamespace(forward_equivalents=2)
    state.observed = [teacher]  # type: ignore[list-item]
    for expected in (21, 21, 30):
        meter.see_step(Progress(0, 1, 0, 1), {"model": net})
        assert state.network_evaluations == expected
        net.forward_equivalents = 3 if expected == 21 and meter._steps == 2 else 0
    assert teacher.forward_equivalents == 0


# ---- not finite ---------------------------------------------------------------------------------


class Elsewhere(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def elsewhere(value: float) -> Tensor:
    return torch.tensor(value).as_subclass(Elsewhere)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made for the GPU is made on the CPU."""
    full = torch.full

    def anywhere(size: Any, value: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        assert device == torch.device("cuda")
        return full(size, value, dtype=dtype)

    monkeypatch.setattr(torch, "full", anywhere)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("see", "what"), [("see_loss", "loss"), ("see_gradient", "gradient")])
def test_on_the_cpu_it_is_refused_at_once(see: str, what: str, bad: float) -> None:
    meter, state = made()
    state.seen_nimg = 40
    getattr(meter, see)(torch.tensor(1.0))
    with pytest.raises(NonFiniteError) as raised:
        getattr(meter, see)(torch.tensor(bad))
    assert str(raised.value) == (
        f"training phase 'train': the {what} is not finite at 40 images seen; the last good "
        "checkpoint is kept; lower optimizer.lr or set optimizer.grad_clip"
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("ask", ["take", "check_finite"])
def test_on_a_gpu_the_first_one_is_named_at_the_end_of_the_interval(ask: str) -> None:
    meter, state = made()
    first = 2**24 + 1  # float32 does not have it
    for nimg, loss in ((0, 1.0), (first, math.nan), (first + 8, 1.0), (first + 16, math.inf)):
        state.seen_nimg = nimg
        meter.see_loss(elsewhere(loss))
        meter.see_gradient(elsewhere(1.0))
    with pytest.raises(NonFiniteError) as raised:
        getattr(meter, ask)()
    assert f"the loss or its gradient is not finite at {first} images seen; " in str(raised.value)


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_a_later_one_does_not_hide_the_very_first() -> None:
    meter, state = made()
    for nimg in (0, 8):
        state.seen_nimg = nimg
        meter.see_loss(elsewhere(math.nan))
    with pytest.raises(NonFiniteError, match="not finite at 0 images seen"):
        meter.check_finite()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("at", [0, 8])
def test_on_a_gpu_a_bad_gradient_is_found_wherever_it_is(at: int) -> None:
    meter, state = made()
    for nimg in (0, 8, 16):
        state.seen_nimg = nimg
        meter.see_loss(elsewhere(1.0))
        meter.see_gradient(elsewhere(math.inf if nimg == at else 1.0))
    with pytest.raises(NonFiniteError, match=f"not finite at {at} images seen"):
        meter.check_finite()


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_finite_numbers_pass() -> None:
    meter, _ = made()
    meter.check_finite()
    meter.see_loss(elsewhere(1.0))
    meter.check_finite()
    step(meter)
    assert meter.take()["loss"] == 1.0


def test_training_time_does_not_contain_compilation(clock: Clock) -> None:
    meter, state = made(compile=True)
    for seconds in (90.0, 5.0, 0.6, 0.5, 0.2, 0.2, 0.3):
        step(meter, clock, seconds)
    # each of the first four counts as much as the fifth
    assert state.seconds == {"train": pytest.approx(5 * 0.2 + 0.2 + 0.3)}
    state.enter(1)
    for seconds in (60.0, 0.1, 0.1, 0.1, 0.1):
        step(meter, clock, seconds)
    assert state.seconds["later"] == pytest.approx(5 * 0.1), "another phase compiles again"


def test_training_time_without_a_compiler_is_all_of_it(clock: Clock) -> None:
    meter, state = made(compile=False)
    for seconds in (3.0, 0.2):
        step(meter, clock, seconds)
    assert state.seconds == {"train": pytest.approx(3.2)}
