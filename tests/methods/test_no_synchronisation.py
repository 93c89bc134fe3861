"""A training step never makes the host wait for the device.

Without a GPU the step runs on *fake* CUDA tensors, which have shapes but no numbers: whatever asks
for a number (``item``, ``bool``, a boolean mask, ``nonzero``) fails, and a dispatch mode refuses
copies between host and device. Autograd needs a real device, so backward passes are checked on the
CPU, by refusing the operations that read a number. A GPU, where there is one, checks it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from method_kit import TINY, context
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmbench.plugin.method import Batch
from cmbench.sweep.estimate import Blank, built_in_place
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import build_modules, stand_in
from cmbench.testing.case import as_target
from cmbench.training import loop, resident
from cmbench.training.augment import LABEL_DIM, DatasetFeed, augment
from cmbench.training.loop import Trainer
from cmbench.training.meter import Meter
from cmbench.training.randomness import RandomState, StepDraws
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState

BATCH = 4
#: Methods with the options under which they take another path, and precisions.
CASES = [
    *((name, {}) for name in sorted(context().plugins.methods.specs)),
    ("edm", {"augment": 0.5, "network": {**TINY["unet-tiny"], "augment_dim": 9}}),
    ("edm", {"optimizer": {"grad_clip": 1.0}}),
    ("edm", {"precision": "fp16"}),
    ("sct", {"n_points": 20}),
    ("sct", {"tangent": "clip"}),
    ("cd", {"target_ema": 0.9}),
]
cases = pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "demo"
)
#: Operations that read numbers of a tensor on the host.
READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::unique_dim",
    "aten::_unique2",
)


class WaitError(AssertionError):
    """The host would wait for the device."""


class Refusing(TorchDispatchMode):
    """Refuses reads of numbers, and copies between CPU and CUDA."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if self.reads and (name in READS or masks):
            raise WaitError(name)
        out = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_"):
            tensors = [v for v in (*tree_leaves(args), out) if isinstance(v, Tensor)]
            if {v.device.type for v in tensors} == {"cpu", "cuda"}:
                raise WaitError(f"{name} between host and device, shape {tuple(out.shape)}")
        return out


def planned(method: str, options: dict[str, Any]) -> RunPlan:
    table = {"network": TINY["unet-tiny"], "batch_size": BATCH, "conditional": True, **options}
    return plan_run(context(), method, "digits", "smoke", 0, table)


class FakeFeed:
    """Images and labels on the fake device."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan

    def batch(self, start: int, count: int, seed: int) -> Batch:
        images = torch.rand(count, 1, 8, 8, device="cuda") * 2 - 1
        labels = torch.zeros(count, dtype=torch.int64, device="cuda")
        if self.plan.config.augment == 0:
            return Batch(images, labels)
        images, told = augment(images, Blank(), self.plan.config.augment)
        assert told.shape == (count, LABEL_DIM)
        return Batch(images, labels, told)


@dataclass
class WithPairs:
    """A feed whose batches have what a phase with generated data asks for."""

    feed: Any
    state: TrainingState

    def batch(self, start: int, count: int, seed: int) -> Batch:
        batch: Batch = self.feed.batch(start, count, seed)
        wanted = self.state.phase.generated
        if wanted is None:
            return batch
        noise = torch.empty_like(batch.images).fill_(0.5)
        target = as_target(batch.images, wanted.states)
        return replace(batch, noise=noise, target=target)


def training(plan: RunPlan, device: str, build: Any, feed: Any) -> Trainer:
    ctx = replace(context(), device=torch.device(device))
    with torch.device(device):
        method, modules = build(ctx, plan, stand_in(ctx, plan, build))
    state = TrainingState(method, modules)
    settings = Settings(seed=0, batch_size=BATCH, precision=plan.config.precision)
    return Trainer(state, WithPairs(feed, state), settings)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA tensors; what would need a driver is left out."""
    torch.ones((), requires_grad=True).backward()  # see cmbench.networks.flops.fake_tensors
    gradient: list[TrainingState] = []

    def no_backward(loss: Tensor) -> None:
        for module in gradient[-1].modules.values():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

    enter = TrainingState.enter

    def entering(state: TrainingState, index: int, **options: Any) -> None:
        gradient.append(state)
        enter(state, index, **options)

    monkeypatch.setattr(TrainingState, "enter", entering)
    monkeypatch.setattr(Tensor, "backward", no_backward)
    monkeypatch.setattr(loop, "StepDraws", lambda *_: Blank())
    monkeypatch.setattr(RandomState, "of", classmethod(lambda cls, d: cls(d, torch.zeros(1))))
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    # What it keeps comes from page-locked memory, which needs a driver.
    monkeypatch.setattr(
        resident,
        "_kept",
        lambda make, arguments, device, dtype: torch.empty_like(
            make(*arguments), device=device, dtype=dtype
        ),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@cases
def test_on_fake_cuda(method: str, options: dict[str, Any], fake_cuda: None) -> None:
    if options.get("precision") == "fp16":
        pytest.skip("torch's GradScaler asks for a CUDA driver")
    if "augment" in options:
        pytest.skip("one of its operations asks for a CUDA driver; see the tests marked cuda")
    plan = planned(method, options)
    trainer = training(plan, "cuda", built_in_place, FakeFeed(plan))
    for index in range(min(len(trainer.state.phases), 2)):
        trainer.state.enter(index)
        trainer.train_step()  # makes what stays on the device
        with Refusing(reads=False):
            trainer.train_step()


@cases
def test_no_number_is_read_on_the_cpu(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "_refuse", lambda *_: None)  # reads numbers on the CPU, on purpose
    plan = planned(method, options)
    feed = DatasetFeed(context().dataset("digits"), plan.config)
    trainer = training(plan, "cpu", build_modules, feed)
    trainer.state.enter(0)
    if options.get("precision") == "fp16" and plan.config.optimizer.name == "radam":
        pytest.skip("RAdam asks whether to step")
    trainer.train_step()

    class Bare(DatasetFeed):
        """The CPU's pixels are gathered by index; a GPU's dataset is tested with the data."""

    images = trainer.feed.batch(BATCH, BATCH, 0)
    monkeypatch.setattr(Bare, "batch", lambda *_: images)
    # fused Adam on the CPU reads its step count from host memory, and the scale from there too
    for optimizer in trainer.state.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: None)
    trainer.feed = Bare(feed.dataset, feed.config)
    with Refusing(reads=True):
        trainer.train_step()


def waits(body: Callable[[Tensor], object]) -> None:
    with Refusing(reads=True):
        body(torch.ones(3))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: float(x[0]),
    ],
)
def test_the_guard_sees_reads(body: Callable[[Tensor], object]) -> None:
    with pytest.raises(WaitError):
        waits(body)


def test_the_guard_sees_copies() -> None:
    with (
        FakeTensorMode(),
        Refusing(reads=False),
        pytest.raises(WaitError, match="between host and device"),
    ):
        torch.linspace(0, 1, 5).to("cuda")


@pytest.mark.cuda
@cases
def test_on_cuda(method: str, options: dict[str, Any]) -> None:
    plan = planned(method, options)
    if options.get("precision") == "fp16" and plan.config.optimizer.name == "radam":
        pytest.skip("RAdam asks whether to step")
    feed = DatasetFeed(context().dataset("digits").to("cuda"), plan.config)
    trainer = training(plan, "cuda", build_modules, feed)
    for index in range(min(len(trainer.state.phases), 2)):
        trainer.state.enter(index)
        trainer.train_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert StepDraws  # real draws, of the device's generator
