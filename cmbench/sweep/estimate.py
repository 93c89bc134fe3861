"""The cost of a run before it starts; neither data nor a teacher nor a GPU is needed.

FLOPs and memory come from one step on torch's fake tensors, which have shapes and types only. Hours
come from a few steps on random images on the current device, if that takes only seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmbench.errors import BrokenRunError, UserError, described
from cmbench.networks.counted import CountedNetwork
from cmbench.networks.flops import fake_tensors, flop_counter
from cmbench.plugin.method import Batch, Method, Phase, Progress, Teacher
from cmbench.sweep.context import Context
from cmbench.sweep.generation_cost import GenerationCost, generation_cost
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import TrainingKit, build_modules, stand_in
from cmbench.training.augment import LABEL_DIM
from cmbench.training.contract import checked_modules, checked_phases
from cmbench.training.loop import Trainer
from cmbench.training.memory import is_out_of_memory
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState, train_only

#: Limits of the calibration: FLOPs per step, and memory on the CPU.
_STEP_FLOPS = {"cpu": 1.0e10, "cuda": 5.0e14}
_CPU_BYTES = 4 * 2**30
#: Memory of a large GPU; plans that need more are shown how to fit.
_GPU_BYTES = 80 * 2**30
#: FLOP/s assumed for hours that were not measured; printed with them.
SUPPOSED_RATE = 1e14
#: GPUs of a typical machine, and the share of a GPU's memory above which splitting is proposed.
_NODE, _WORTH_SPLITTING = 8, 0.25
_WARM_UP, _TIMED = 2, 3
_FP32_BYTES = 4


class Counted(NamedTuple):
    """What a step on fake tensors tells: of weights, moments and averages the ``fixed_bytes``."""

    images: int
    flops: float
    fixed_bytes: float
    activation_bytes: float
    generated: tuple[GenerationCost, ...]


@dataclass(frozen=True)
class Cost:
    """Estimates of one training in one process; None where ``note`` says why."""

    images: int
    flops_per_image: float | None = None
    peak_bytes: float | None = None
    device_hours: float | None = None
    note: str = ""
    generated: tuple[GenerationCost, ...] = ()


def estimate(context: Context, plan: RunPlan) -> Cost:
    """Estimate a run's cost; what cannot be estimated is None, with the reason in the note."""
    images = round(plan.config.duration_kimg * 1000)
    try:
        images, flops, fixed, activations, generated = count(context, plan)
    except Exception as error:  # a failing estimate must not hide the plan
        return Cost(images, note=f"not counted: {_why(error)}")
    peak = fixed + activations
    advice = _advice(plan, fixed, activations)
    reason = _too_much(context, flops, fixed)
    if reason:
        at_rate = f"; {supposed_hours(flops, images):,.0f} h at {SUPPOSED_RATE:g} FLOP/s"
        note = f"not measured: {reason}{at_rate}{advice}"
        supposed = tuple(
            made.at(SUPPOSED_RATE, f"at {SUPPOSED_RATE:g} FLOP/s") for made in generated
        )
        return Cost(images, flops, peak, None, note, supposed)
    batch = _calibration_batch(context, plan, flops)
    try:
        batch, seconds = _fitting(context, plan, batch)
    except Exception as error:
        note = f"not measured: {_why(error)}{advice}"
        return Cost(images, flops, peak, None, note, generated)
    attained = flops / seconds
    how = "eager" if context.device.type == "cuda" else f"{context.threads} thread(s)"
    note = f"{_TIMED} steps of {batch} images on {context.device}, {how}, {attained:.2g} FLOP/s"
    timed = tuple(made.at(attained) for made in generated)
    return Cost(images, flops, peak, seconds * images / 3600, note + advice, timed)


def supposed_hours(flops_per_image: float, images: int) -> float:
    """Return the hours of a training at :data:`SUPPOSED_RATE`."""
    return flops_per_image * images / SUPPOSED_RATE / 3600


def _fitting(context: Context, plan: RunPlan, batch: int) -> tuple[int, float]:
    """Return the batch of the calibration, halved until it fits, and the seconds per image."""
    while True:
        try:
            return batch, seconds_per_image(context, plan, batch)
        except (RuntimeError, MemoryError, BrokenRunError) as error:
            if not is_out_of_memory(error) or batch == 1:
                raise
        batch //= 2  # the error, which keeps the step's tensors alive, is deleted here
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _advice(plan: RunPlan, fixed_bytes: float, activation_bytes: float) -> str:
    """Return which shards of the batch would fit a large GPU, if the whole batch does not.

    If weights, moments and averages need a large part of it, also return what splitting them saves.
    """
    batch = plan.config.batch_size
    shard = min(plan.config.microbatch_size or batch, batch)
    split = ""
    if fixed_bytes > _WORTH_SPLITTING * _GPU_BYTES:
        each = fixed_bytes / _NODE / 2**30
        split = (
            f"; split over {_NODE} GPUs (--split), weights and averages take {each:.1f} GiB each"
        )
    if fixed_bytes + activation_bytes <= _GPU_BYTES:
        return split
    room = (_GPU_BYTES - fixed_bytes) * shard / activation_bytes
    fits = [n for n in range(1, shard) if batch % n == 0 and n <= room]
    wanted = f"-o microbatch_size={fits[-1]} would fit" if fits else "one image does not fit"
    return f"; {wanted} {_GPU_BYTES / 2**30:.0f} GiB{split}"


def _why(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return described(error, 500)


def _too_much(context: Context, flops: float, fixed_bytes: float) -> str:
    device, most = context.device.type, _STEP_FLOPS[context.device.type]
    if flops > most:
        return f"{flops:.2g} FLOPs per image are too many for a short calibration on {device}"
    if device == "cpu" and fixed_bytes > _CPU_BYTES:
        return f"weights and their averages need {fixed_bytes / 2**30:.1f} GiB"
    return ""


def _calibration_batch(context: Context, plan: RunPlan, flops: float) -> int:
    shard = plan.config.microbatch_size or plan.config.batch_size
    fits = int(_STEP_FLOPS[context.device.type] / max(flops, 1.0))
    return max(1, min(shard, plan.config.batch_size, fits))


# ---- counted on fake tensors ---------------------------------------------------------------------


class Blank:
    """Draws of the right shape with arbitrary values, or none on fake tensors."""

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return memory shaped as ``like``."""
        return torch.empty_like(like)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Return memory shaped as ``like``."""
        return torch.empty_like(like)


class _Saved:
    """Adds up the bytes that autograd keeps for the backward pass, without parameters."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        parameters = [p for m in modules.values() for p in m.parameters()]
        self._seen = {p.untyped_storage()._cdata for p in parameters}
        self._kept: list[Tensor] = []  # kept alive, so that no address is used twice
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def count(context: Context, plan: RunPlan) -> Counted:
    """Count a step of the first phase, and the making of a pair for each phase that asks for them.

    FLOPs are those of matrix products and convolutions in a step of the first phase, teachers and
    target networks included. Activations are those that autograd keeps for one shard, uncompiled.
    """
    with fake_tensors():
        return _count(replace(context, device=torch.device("cpu")), plan)


def built_in_place(
    context: Context, plan: RunPlan, teacher: Teacher | None
) -> tuple[Method, dict[str, nn.Module]]:
    """Build modules without moving them: fake tensors cannot be moved."""
    method = plan.method(context)
    modules = method.modules(TrainingKit(context, plan, method.data, teacher))
    return method, checked_modules(method, modules)


def _count(context: Context, plan: RunPlan) -> Counted:
    teacher = stand_in(context, plan, built_in_place)
    method, modules = built_in_place(context, plan, teacher)
    phases = checked_phases(method, modules)
    images = sum(phase.images for phase in phases)
    trained = {name for o in phases[0].objectives for name in o.trains}
    shard = min(plan.config.microbatch_size or plan.config.batch_size, plan.config.batch_size)
    least = min(shard, max(objective.group for objective in phases[0].objectives))
    most = min(shard, 2 * least)
    kept = {n: _counted_step(context, plan, method, modules, phases[0], n) for n in {least, most}}
    # What a second image adds is needed per image, the rest (cast weights) once.
    each = (kept[most][1] - kept[least][1]) / max(most - least, 1)
    activations = kept[least][1] + each * (shard - least)
    averaged = [*method.sampled_modules(modules)] * len(phases[0].ema)
    fixed = _fixed_bytes(modules, trained, teacher, averaged)
    made = tuple(
        generation_cost(plan, method, modules, phase) for phase in phases if phase.generated
    )
    return Counted(images, kept[most][0] / most, fixed, float(activations), made)


def _counted_step(
    context: Context,
    plan: RunPlan,
    method: Method,
    modules: dict[str, nn.Module],
    phase: Phase,
    images: int,
) -> tuple[float, int]:
    """Return the FLOPs of a step, and the bytes that are kept for its backward pass."""
    nets = {name: CountedNetwork(m, plan.config.precision) for name, m in modules.items()}
    saved, flops = _Saved(modules), 0.0
    for objective in phase.objectives:
        train_only(modules, objective.trains)
        batch = _random_batch(method, plan, images, context.device, phase)
        with flop_counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(saved, lambda kept: kept):
                loss = objective.loss(nets, batch, Blank(), Progress(0, phase.images, 0, 1))
            loss.sum().backward()  # type: ignore[no-untyped-call]
        flops += counter.get_total_flops() / objective.every
    return flops, saved.bytes


def _fixed_bytes(
    modules: dict[str, nn.Module],
    trained: set[str],
    teacher: Teacher | None,
    averaged: Sequence[str],
) -> float:
    """Return the bytes of weights, gradients, Adam's two moments, and averages, in float32."""
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    numbers = sum(sizes.values()) + 3 * sum(sizes[name] for name in trained)
    numbers += sum(sizes[name] for name in averaged)
    if teacher is not None and teacher.network is not None:
        numbers += sum(p.numel() for p in teacher.network.parameters())
    return float(_FP32_BYTES * numbers)


def _random_batch(
    method: Any, plan: RunPlan, count: int, device: torch.device, phase: Phase
) -> Batch:
    images = torch.rand(count, *method.data.data_shape, device=device) * 2 - 1
    classes = method.data.num_classes
    labels = torch.zeros(count, dtype=torch.int64, device=device) if classes else None
    augmented = torch.zeros(count, LABEL_DIM, device=device) if plan.config.augment > 0 else None
    if phase.generated is None:
        return Batch(images, labels, augmented)
    states, shape = phase.generated.states, method.data.data_shape
    target = images if states == 1 else torch.rand(count, states, *shape, device=device) * 2 - 1
    return Batch(images, labels, augmented, noise=torch.randn_like(images), target=target)


# ---- measured on the device at hand --------------------------------------------------------------


@dataclass(frozen=True)
class _RandomFeed:
    method: Any
    plan: RunPlan
    device: torch.device
    phase: Phase

    def batch(self, start: int, count: int, seed: int) -> Batch:
        return _random_batch(self.method, self.plan, count, self.device, self.phase)


def seconds_per_image(context: Context, plan: RunPlan, batch: int) -> float:
    """Time steps of ``batch`` random images with random weights, uncompiled."""
    method, modules = build_modules(context, plan, stand_in(context, plan, build_modules))
    state = TrainingState(method, modules)
    group = max(objective.group for objective in state.phases[0].objectives)
    batch = -(-batch // group) * group
    settings = Settings(seed=0, batch_size=batch, precision=plan.config.precision, log_seconds=1e9)
    trainer = Trainer(state, _RandomFeed(method, plan, context.device, state.phases[0]), settings)
    state.enter(0, start=trainer.phase_start(0))
    for step in range(_WARM_UP + _TIMED):
        if step == _WARM_UP:
            _wait(context.device)
            began = time.perf_counter()
        trainer.train_step()
    _wait(context.device)
    return (time.perf_counter() - began) / (_TIMED * batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
