"""What one of several processes says when the others are gone, and which messages it sends.

The others are played by replacing ``torch.distributed``: no process is started.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from test_trainer import BATCH, Feed, Given, Net, phase
from torch import Tensor, nn

from cmbench.errors import BrokenRunError, MissingError, UserError
from cmbench.plugin.method import Progress
from cmbench.training import distributed
from cmbench.training.distributed import (
    PATIENCE,
    RELAYED,
    SHORT_PATIENCE,
    LostProcessError,
    SharedFailureError,
    World,
    joined,
)
from cmbench.training.launch import Launch
from cmbench.training.loop import Trainer, in_step
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState

GROUP = object()
LOST = (
    "rank 1 of 3: lost another process (Connection closed by peer); see the error of that process, "
    "then start the same command again: training resumes from the last good checkpoint"
)


def world() -> World:
    return World(1, 3, GROUP)


def gone(*_: Any, **__: Any) -> None:
    raise RuntimeError("\n Connection closed by peer\nat line 7")


def parameter() -> nn.Parameter:
    found = nn.Parameter(torch.zeros(2))
    found.grad = torch.ones(2)
    return found


def sum_gradients() -> None:
    one = [parameter()]
    world().sum_gradients(one, world().flat_gradients(one))


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("all_reduce", lambda: world().agree(True)),
        ("all_reduce", lambda: world().sum(torch.ones(()))),
        ("all_reduce", sum_gradients),
        ("broadcast_object_list", lambda: world().lead(dict)),
        ("all_gather_object", lambda: world()._raise_first(ValueError("x"))),
    ],
)
def test_each_message_says_in_one_line_that_another_process_is_gone(
    missing: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, missing, gone)
    with pytest.raises(LostProcessError) as raised:
        call()
    assert str(raised.value) == LOST


class Others:
    """Plays the other processes: what they add to sums, and how long they were waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flags: list[int] | None = None) -> None:
        self.flags = flags or [0, 0, 0, 0]
        self.groups: list[object] = []
        self.waited: list[timedelta] = []
        self.told: list[Any] = [None, None, None]
        self.sent: list[list[int]] = []
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "all_gather_object", self.all_gather_object)

    def all_reduce(self, message: Tensor, **options: Any) -> SimpleNamespace:
        self.groups.append(options["group"])
        assert options["op"] == dist.ReduceOp.MAX
        assert options["async_op"]
        self.sent.append(message.tolist())
        message.copy_(torch.maximum(message, torch.tensor(self.flags)))
        return SimpleNamespace(wait=self.waited.append)

    def all_gather_object(self, told: list[Any], mine: Any, group: object = None) -> None:
        self.groups.append(group)
        told[:] = self.told
        told[1] = mine


def test_flags_are_joined_over_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, [0, 1, 0, 0])
    assert world().agree(False, False, True) == (True, False, True)
    assert world().agree(False) == (True,)
    assert others.sent == [[0, 0, 0, 1], [0, 0, 0, 0]], "messages have one length"
    assert others.groups == [GROUP, GROUP]
    assert others.waited == [PATIENCE, PATIENCE]
    world().agree(patience=timedelta(seconds=2))
    assert others.waited[-1] == timedelta(seconds=2)


def test_the_failure_of_the_first_that_has_one_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, [1, 0, 0, 0])
    others.told = [None, None, ("OSError: no image", False, "the trace of rank 2")]
    mine = ValueError("mine")
    with pytest.raises(SharedFailureError) as raised:
        world().agree(failure=mine)
    assert (raised.value.where, raised.value.what) == ("rank 1 of 3", "ValueError: mine")
    assert not raised.value.foreseen
    assert raised.value.__cause__ is mine
    assert "ValueError: mine" in raised.value.__notes__[0]
    with pytest.raises(SharedFailureError) as raised:
        world().agree(True)
    assert (raised.value.where, raised.value.what) == ("rank 2 of 3", "OSError: no image")
    assert raised.value.__notes__ == ["the trace of rank 2"]
    assert raised.value.__cause__ is None
    assert others.groups == [GROUP] * 4
    with pytest.raises(SharedFailureError) as raised:
        world().agree(failure=UserError("data", "is gone"))
    assert (raised.value.what, raised.value.foreseen) == ("data: is gone", True)


def test_a_failure_that_nobody_comes_to_hear_is_raised_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = Others(monkeypatch)
    error = OSError("image 7\ncannot be read")
    with pytest.raises(SharedFailureError):
        world().share(error)
    assert others.waited == [SHORT_PATIENCE]
    monkeypatch.setattr(dist, "all_reduce", gone)
    with pytest.raises(BrokenRunError) as raised:
        world().share(error)
    assert str(raised.value).startswith("rank 1 of 3: OSError: image 7; the others wait for its ")
    assert raised.value.__cause__ is error
    with pytest.raises(BrokenRunError, match="rank 1 of 3: ValueError: ValueError; the others"):
        world().share(ValueError())
    with pytest.raises(BrokenRunError, match=f"OSError: {'x' * 300}; the others"):
        world().share(OSError("x" * 301))


# ---- rank 0 leads -------------------------------------------------------------------------------


class Leader:
    """Carries what rank 0 broadcasts to the others, who get it when they ask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Any] = []
        monkeypatch.setattr(dist, "broadcast_object_list", self.broadcast)

    def broadcast(self, message: list[Any], *, src: int, group: object) -> None:
        assert (src, group) == (0, GROUP)
        if message[0] is not None:
            self.sent.append(copy.deepcopy(message[0]))
        else:
            message[0] = self.sent[-1]


def never() -> None:
    raise AssertionError("only rank 0 works")


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (MissingError("weights", "are not here", remedy="fetch"), MissingError, "weights: are not"),
        (ZeroDivisionError("by zero"), BrokenRunError, "rank 0: ZeroDivisionError: by zero"),
        (KeyboardInterrupt("told"), BrokenRunError, "rank 0: KeyboardInterrupt: told"),
        (LostProcessError("rank 0", "is alone"), LostProcessError, "rank 0: is alone"),
        (SharedFailureError("rank 2", "broke", True), SharedFailureError, "rank 2: broke"),
    ],
)
def test_what_rank_0_raises_is_raised_everywhere(
    error: BaseException, kind: type[UserError], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Leader(monkeypatch)

    def work() -> None:
        raise error

    with pytest.raises(type(error)) as own:
        World(0, 3, GROUP).lead(work)
    assert own.value is error
    with pytest.raises(UserError, match=line) as relayed:
        world().lead(never)
    assert type(relayed.value) is kind
    assert relayed.value.__notes__ == [RELAYED]
    if isinstance(error, UserError):
        assert str(relayed.value) == str(error)


def test_what_rank_0_returns_is_returned_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    Leader(monkeypatch)
    assert World(0, 3, GROUP).lead(lambda: [1, 2]) == [1, 2]
    assert world().lead(never) == [1, 2]
    assert World(0, 3).leads
    assert not world().leads


# ---- joining ------------------------------------------------------------------------------------


def test_who_cannot_join_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "Connection closed by peer"
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: gone_with(f"{message}\nmore"))
    with pytest.raises(MissingError) as raised, joined(Launch(1, 3, 1, 3), torch.device("cpu")):
        pass
    assert str(raised.value) == (
        f"rank 1 of 3: cannot join the others ({message}); allowed: MASTER_ADDR and MASTER_PORT "
        "of a machine that all processes can reach; start with torchrun"
    )
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: gone_with(""))
    with (
        pytest.raises(MissingError, match=r"cannot join the others \(\);"),
        joined(Launch(1, 3, 1, 3), torch.device("cpu")),
    ):
        pass


def gone_with(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_tensors_go_over_the_devices_backend_and_agreements_over_gloo(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **o: calls.append((a, o)))
    monkeypatch.setattr(dist, "new_group", lambda **o: calls.append(o) or GROUP)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    with joined(Launch(1, 3, 1, 3), torch.device(device)) as found:
        assert (found.rank, found.size, found.control) == (1, 3, GROUP)
    options = {"rank": 1, "world_size": 3, "timeout": timedelta(hours=1)}
    assert calls == [((backend,), options), {"backend": "gloo", "timeout": PATIENCE}, "left"]


def test_the_error_that_ended_a_process_is_told_whatever_leaving_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    group = SimpleNamespace(abort=lambda: gone_with("nothing to abort"))
    for there in (group, None):
        monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
        monkeypatch.setattr(dist, "new_group", lambda **_: None)
        monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=there))
        monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
        with pytest.raises(OSError, match="no image"), joined(Launch(1, 3), torch.device("cpu")):
            raise OSError("no image")
    assert calls == ["left", "left"]


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "init_process_group", gone)
    with joined(Launch(), torch.device("cpu")) as found:
        assert (found.rank, found.size, found.control) == (0, 1, None)


# ---- gradients ----------------------------------------------------------------------------------


def test_the_flat_message_and_what_comes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients one after the other, then for each whether this process has it."""
    used, unused, nowhere = parameter(), parameter(), parameter()
    unused.grad = nowhere.grad = None
    flat = world().flat_gradients([used, unused, nowhere])
    assert flat is not None
    assert flat.tolist() == [1, 1, 0, 0, 0, 0, 1, 0, 0]
    others = torch.tensor([2.0, 3, 4, 5, 0, 0, 2, 1, 0])
    monkeypatch.setattr(dist, "all_reduce", lambda message: message.add_(others))
    before = used.grad
    world().sum_gradients([used, unused, nowhere], flat)
    assert used.grad is before
    assert used.grad is not None
    assert used.grad.tolist() == [3, 4]
    assert unused.grad is not None
    assert unused.grad.tolist() == [4, 5]
    assert nowhere.grad is None
    assert world().flat_gradients([]) is None
    assert World().flat_gradients([used]) is None


# ---- a step that fails --------------------------------------------------------------------------


def state_of(sharding: Any = None) -> TrainingState:
    return TrainingState(Given(phase()), {"model": Net()}, sharding)


def shared() -> SharedFailureError:
    return SharedFailureError("rank 2 of 3", "OSError: no image", foreseen=False)


@pytest.mark.parametrize("sharding", [None, SimpleNamespace(hosts_wait=True)])
def test_where_hosts_wait_a_shared_failure_stays_one(sharding: Any) -> None:
    with pytest.raises(SharedFailureError), in_step(state_of(sharding)):
        raise shared()


@pytest.mark.parametrize("leads", [True, False])
def test_where_gpus_wait_a_shared_failure_ends_all_processes(leads: bool) -> None:
    sharding = SimpleNamespace(hosts_wait=False, world=SimpleNamespace(leads=leads))
    with pytest.raises(BrokenRunError) as raised, in_step(state_of(sharding)):
        raise shared()
    assert type(raised.value) is BrokenRunError
    assert str(raised.value).startswith("rank 2 of 3: OSError: no image; all processes end, ")
    assert getattr(raised.value, "__notes__", []) == ([] if leads else [RELAYED])


class Failing(World):
    """The first of two processes, whose other one fails or agrees to all."""

    heard: ClassVar[list[BaseException | None]] = []

    def agree(self, *flags: bool, failure: BaseException | None = None, **_: Any) -> Any:
        self.heard.append(failure)
        if failure is not None:
            raise SharedFailureError("rank 0 of 2", str(failure), foreseen=False)
        return flags

    def sum(self, value: Tensor) -> Tensor:
        return value

    def sum_gradients(self, parameters: Any, flat: Tensor | None) -> None:
        return

    def share(self, failure: BaseException) -> None:
        self.heard.append(failure)
        raise BrokenRunError("rank 0 of 2", "shared")


def trainer_of(state: TrainingState, size: int = 2, watchers: Watchers | None = None) -> Trainer:
    settings = Settings(3, BATCH, log_seconds=0.0, world=Failing(0, size))
    return Trainer(state, Feed(), settings, watchers)


def failing_step(error: BaseException) -> Callable[[Trainer], None]:
    def step(trainer: Trainer) -> None:
        raise error

    return step


def test_what_fails_in_a_step_is_agreed_on_before_anything_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Failing, "heard", [])

    def after_step(nets: Any, progress: Progress) -> None:
        raise OSError("broke after the step")

    state = TrainingState(Given(phase(after_step=after_step)), {"model": Net()})
    logged: list[object] = []
    with pytest.raises(SharedFailureError, match="broke after the step"):
        trainer_of(state, watchers=Watchers(log=lambda *_: logged.append(1))).train()
    assert logged == []
    assert isinstance(Failing.heard[-1], OSError)


@pytest.mark.parametrize("error", [OSError("x"), SystemExit("x")])
@pytest.mark.parametrize("size", [1, 2])
def test_a_failed_attempt_is_raised_alone_and_returned_among_several(
    size: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train_step", failing_step(error))
    state = state_of()
    state.enter(0)
    if size == 1:
        with pytest.raises(type(error)):
            trainer_of(state, 1).attempt_step()
    else:
        assert trainer_of(state).attempt_step() is error


def test_a_failed_attempt_of_a_split_run_is_shared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train_step", failing_step(OSError("no image")))
    state = state_of()
    state.enter(0)
    trainer = trainer_of(state)
    state.sharding = SimpleNamespace(hosts_wait=True)  # type: ignore[assignment]
    with pytest.raises(BrokenRunError, match="rank 0 of 2: shared"):
        trainer.attempt_step()


@pytest.mark.parametrize("error", [shared(), LostProcessError("rank 0", "alone")])
def test_what_every_process_meets_is_raised_as_it_is(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train_step", failing_step(error))
    state = state_of()
    state.enter(0)
    with pytest.raises(type(error)) as raised:
        trainer_of(state).attempt_step()
    assert raised.value is error


def test_a_shared_failure_of_a_run_ends_processes_whose_gpus_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Failing, "heard", [])
    monkeypatch.setattr(Trainer, "attempt_step", lambda trainer: OSError("no image"))
    state = state_of()
    state.enter(0)
    trainer = trainer_of(state)
    state.sharding = SimpleNamespace(  # type: ignore[assignment]
        hosts_wait=False, world=trainer.settings.world
    )
    with pytest.raises(BrokenRunError, match="all processes end, ") as raised:
        trainer.train()
    assert type(raised.value) is BrokenRunError


@pytest.mark.parametrize("watcher", ["log", "checkpoint", "phase_done"])
def test_what_a_watcher_of_one_process_raises_is_raised_in_all(
    watcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "heard", [])

    def watch(*_: object) -> None:
        raise OSError("disk full")

    state = state_of()
    trainer = trainer_of(state, watchers=Watchers(**{watcher: watch}))
    trainer.settings.checkpoint_nimg = BATCH
    with pytest.raises(SharedFailureError, match="disk full"):
        trainer.train()
    assert isinstance(Failing.heard[-1], OSError)


def test_what_the_start_of_a_phase_raises_in_one_process_is_raised_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Failing, "heard", [])

    def start(nets: object) -> None:
        raise OSError("no teacher")

    state = TrainingState(Given(phase(start=start)), {"model": Net()})
    with pytest.raises(SharedFailureError, match="no teacher"):
        trainer_of(state).train()


def test_constants_of_several_processes() -> None:
    """Longer than any evaluation; short beside a launcher's own patience."""
    assert timedelta(days=1) <= PATIENCE
    assert timedelta(seconds=30) <= SHORT_PATIENCE <= timedelta(minutes=5)
    assert distributed.SPLIT_FROM == 1_000_000_000, "EDM2-XL is split, EDM2-L is not"
