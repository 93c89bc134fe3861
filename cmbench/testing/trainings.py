"""Checks that train a few steps: repeatable, resumable after a kill, alike in two processes."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cmbench.plugin.method import Batch
from cmbench.sweep.plans import RAW
from cmbench.sweep.runs import build_modules, load_weights
from cmbench.testing.building import first_difference, same, scramble, tensors_of
from cmbench.testing.case import Case, RandomFeed, Subject, trainer
from cmbench.testing.check import CheckFailure
from cmbench.testing.processes import children, in_two_processes, why_no_children
from cmbench.testing.samples import COUNT, plans, sampler
from cmbench.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cmbench.training.contract import sampled_modules
from cmbench.training.distributed import World
from cmbench.training.state import TrainingState

#: Of a gradient, relative to its norm: sums over shards in another order.
TOLERANCE = 1e-4


@dataclass
class DeadlyFeed(RandomFeed):
    """Kills this process when an image is asked for: as a machine that loses power."""

    at: int = 0

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return images, or do not return."""
        if start <= self.at < start + count:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(start, count, seed)


def trained(subject: Subject, seed: int = 1) -> tuple[Case, TrainingState]:
    """Build and train; ``seed`` is that of the global generators."""
    scramble(seed)
    case = subject.case()
    ready = trainer(case)
    ready.train()
    return case, ready.state


def copied(state: TrainingState) -> dict[str, Tensor]:
    """Return the whole state."""
    return {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def determinism(subject: Subject) -> None:
    """Two trainings under one seed are bitwise equal on the CPU."""
    found = [copied(trained(subject, seed)[1]) for seed in (1, 2)]
    different = first_difference(*found)
    if different is not None:
        raise CheckFailure(
            f"two trainings under one seed differ, first in {different!r}",
            "draw with draws only, in the loss, in start and in after_step",
        )


def restored_samples(subject: Subject) -> None:
    """Samples of the exported weights, read from disk, are those of the networks in memory."""
    case, state = trained(subject)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_checkpoint(path, state.export(), {})
        method, modules = build_modules(subject.context, case.plan, None)
        load_weights(load_checkpoint(path), sampled_modules(method, modules), RAW)
    again = Case(case.plan, method, modules, None)
    last = state.phase.export
    usable = [plan for plan in plans(subject) if plan.variant in ("", last)]
    for plan in usable[:2]:
        scramble(3)
        first, second = (sampler(c, plan).make(0, COUNT).images for c in (case, again))
        if not same(first, second):
            raise CheckFailure(
                f"restored from its export, the method samples other images at NFE {plan.nfe}",
                "keep what training learns in modules that build returns and sampled_modules names",
            )


def resuming(subject: Subject) -> str | None:
    """A training that is killed and resumed ends bitwise where an uninterrupted one does."""
    if reason := why_no_children():
        return reason
    case, state = trained(subject)
    middle = state.seen_nimg // case.batch_size // 2 + 1
    with TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        _die(subject, folder, at=middle * case.batch_size + case.shard)
        latest, _ = latest_checkpoint(folder) if folder.exists() else (None, [])
        if latest is None:
            raise CheckFailure("training ends before its second step", "see the other checks")
        scramble(4)
        resumed = trainer(subject.case())
        resumed.state.load(latest.tensors, latest.meta["state"])
    resumed.train()
    different = first_difference(copied(state), copied(resumed.state))
    if different is not None:
        raise CheckFailure(
            f"killed and resumed, training ends elsewhere, first in {different!r}",
            "keep what changes during training in modules or buffers that build returns, and what "
            "depends on the step in progress",
        )
    return None


def _die(subject: Subject, folder: Path, at: int) -> None:
    """Train in a child that is killed within the step that needs image ``at``."""

    def save(state: TrainingState) -> None:
        path = folder / f"{state.seen_nimg:09d}.safetensors"
        save_checkpoint(path, state.tensors(), {"state": state.meta()})

    def child(rank: int, pipe: Connection) -> None:
        case = subject.case()
        trainer(case, feed=DeadlyFeed(case.data, case.feed.states, at), save=save).train()

    with children(child, 1):
        pass


def two_processes(subject: Subject) -> str | None:
    """Two processes have the gradients of one that accumulates the same shards."""
    if reason := why_no_children():
        return reason

    def steps(world: World) -> tuple[dict[str, Any], dict[str, Any]]:
        case = subject.case()
        ready = trainer(case, world=world)
        ready.state.enter(0, start=ready.phase_start(0))
        ready.train_step()
        named = [(f"{n}.{k}", p) for n, m in case.modules.items() for k, p in m.named_parameters()]
        gradients = {n: p.grad.numpy().copy() for n, p in named if p.grad is not None}
        ready.train_step()
        return gradients, {n: t.numpy() for n, t in tensors_of(case.modules).items()}

    alone, _ = steps(World())
    (first, weights), (_, others) = in_two_processes(steps)
    names = sorted(weights)
    apart = next((n for n in names if not (weights[n] == others[n]).all()), None)
    if apart is not None:
        raise CheckFailure(
            f"after two steps {apart!r} differs between two processes",
            "change modules by gradients, or in after_step from other modules only",
        )
    pairs = [(torch.as_tensor(alone[n]), torch.as_tensor(first[n])) for n in sorted(alone)]
    gap = float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5
    size = float(sum(a.square().sum() for a, _ in pairs)) ** 0.5
    if alone.keys() != first.keys() or gap > TOLERANCE * size:
        raise CheckFailure(
            f"two processes have another gradient than one: off by {gap / size:.1%}",
            "compute each image's loss from that image alone",
        )
    return None


def half_precision(subject: Subject) -> None:
    """Training and sampling work under bf16 autocast; images stay float32."""
    case = subject.case(precision="bf16")
    trainer(case, precision="bf16", most=2).train()
    for plan in plans(subject)[:2]:
        images = sampler(case, plan, precision="bf16").make(0, COUNT).images
        if images.dtype != torch.float32:
            raise CheckFailure(
                f"sample at NFE {plan.nfe} returns {images.dtype} under bf16",
                "return the images as noise.dtype",
            )
