"""Build the networks of runs, and load the weights of finished runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmbench.diffusion.models import DiffusionModel
from cmbench.errors import UserError
from cmbench.networks.base import is_addition, num_parameters
from cmbench.networks.counted import SampledNetworks, to_device
from cmbench.plugin.method import DataInfo, Method, Nets, Teacher
from cmbench.seeds import derive_seed
from cmbench.sweep.context import Context
from cmbench.sweep.plans import Builder, RunPlan
from cmbench.sweep.run_files import MAIN, SNAPSHOTS, read_result_file, require_run, weights_path
from cmbench.sweep.validation import validate
from cmbench.training.checkpoint import Checkpoint, load_checkpoint
from cmbench.training.contract import checked_modules, sampled_modules
from cmbench.training.memory import building_memory_explained
from cmbench.training.posthoc import asked_width, reconstruct
from cmbench.training.state import under


@dataclass(frozen=True)
class TrainedRun:
    """A finished run on disk."""

    plan: RunPlan
    folder: Path
    result: Mapping[str, Any]

    def weights(self, variant: str = "") -> Checkpoint:
        """Return the weights of a variant (a phase's export), or the final ones."""
        name = variant or MAIN
        if name not in self.result["exports"]:
            raise UserError(
                f"run {self.plan.run_id}",
                f"has no variant {name!r}",
                allowed=", ".join(sorted(self.result["exports"])),
                remedy="choose an NFE it supports",
            )
        if self.plan.imported is not None:
            return self.plan.imported.export()
        remedy = f"restore the file, or delete {self.folder} to train the run again"
        found = load_checkpoint(weights_path(self.folder, name), remedy)
        self._require_own(found, self.result["exports"][name], remedy)
        return found

    def _require_own(self, found: Checkpoint, export: Mapping[str, Any], remedy: str) -> None:
        """Raise ``UserError`` unless weights are those of this run and of its result."""
        require_run(f"checkpoint {found.path}", found.meta.get("run"), self.plan.run_id, remedy)
        pairs = {
            "sha256": (found.sha256, export["sha256"]),
            "images": (found.meta.get("seen_nimg"), export["images_seen"]),
        }
        for what, (of_weights, expected) in pairs.items():
            if of_weights != expected:
                raise UserError(
                    f"checkpoint {found.path}",
                    f"is not what the run's other files describe: {what} {of_weights}",
                    allowed=str(expected),
                    remedy=remedy,
                )


def read_result(plan: RunPlan, folder: Path) -> TrainedRun | None:
    """Return the finished run in ``folder``, or None if training is not complete.

    Raises:
        UserError: the folder is of another run, or its result cannot be read.
    """
    result = read_result_file(folder, plan.run_id)
    return TrainedRun(plan, folder, result) if result is not None else None


@contextmanager
def seeded(*names: int | str) -> Iterator[None]:
    """Draw torch's random numbers on the CPU from a named seed, then go on where they were."""
    before = torch.get_rng_state()
    torch.manual_seed(derive_seed(*names))
    try:
        yield
    finally:
        torch.set_rng_state(before)


class TrainingKit:
    """Builds networks as the recipe says (see :class:`cmbench.plugin.method.Kit`)."""

    def __init__(
        self, context: Context, plan: RunPlan, data: DataInfo, teacher: Teacher | None
    ) -> None:
        self.context, self.plan, self.data, self.teacher = context, plan, data, teacher
        self._built = 0

    def network(self, *, channel_copies: int = 1, **overrides: Any) -> nn.Module:
        """Build a network with initial weights from (seed, "weights", how many were built)."""
        channels, height, width = self.data.data_shape
        table = {**self.plan.config.network, **overrides}
        name = table.pop("name")
        network_class: Any = self.context.plugins.networks.load(name)
        config = validate(network_class.Config, table, f"network {name!r}")
        shape = (channels * channel_copies, height, width)
        drawn = seeded(self.plan.seed, "weights", self._built)
        with drawn, building_memory_explained(name):
            network: nn.Module = network_class(config, shape, self.data.num_classes)
        self._built += 1
        return network

    def student(
        self, parameterization: str, *, channel_copies: int = 1, **overrides: Any
    ) -> nn.Module:
        """Build a network; copy the weights of the teacher's into it, if there is one."""
        network, teacher = self.network(channel_copies=channel_copies, **overrides), self.teacher
        if teacher is None or teacher.network is None:
            return network
        if teacher.parameterization != parameterization:
            raise UserError(
                f"teacher {teacher.name}",
                f"its parameterization is {teacher.parameterization or 'not stated'!r}",
                allowed=f"{parameterization!r} for this student",
                remedy="name another teacher, or set parameterization where the method has it",
            )
        state = teacher.network.state_dict()
        own = network.state_dict()
        new = {k: v for k, v in own.items() if k not in state and is_addition(k)}
        state = {**state, **new}  # what the teacher lacks starts at (or near) zero
        ours = {k: tuple(v.shape) for k, v in own.items()}
        theirs = {k: tuple(v.shape) for k, v in state.items()}
        if ours != theirs:
            names = sorted(ours.keys() | theirs.keys())
            differing = [name for name in names if ours.get(name) != theirs.get(name)]
            raise UserError(
                f"run {self.plan.run_id}",
                f"its network differs from teacher {teacher.name}'s in {len(differing)} tensors "
                f"(first: {differing[0]})",
                allowed="the teacher's architecture and classes",
                remedy="give both recipes the same network table",
            )
        network.load_state_dict(state)
        return network


def build_modules(
    context: Context, plan: RunPlan, teacher: Teacher | None
) -> tuple[Method, dict[str, nn.Module]]:
    """Build a run's method and modules, with initial weights from the run's seed."""
    method = plan.method(context)
    kit = TrainingKit(context, plan, method.data, teacher)
    with seeded(plan.seed, "modules"):  # what a method builds without the kit, such as heads
        modules = checked_modules(method, method.modules(kit))
    return method, {name: on_device(context, module) for name, module in modules.items()}


def on_device(context: Context, module: nn.Module) -> nn.Module:
    """Move a network to the context's device; on CUDA its convolutions are channels-last."""
    return to_device(module, context.device, channels_last=context.device.type == "cuda")


def require_parameters(trained: TrainedRun, sampled: nn.Module) -> None:
    """Raise ``UserError`` unless a run's result counts the parameters of what is sampled."""
    found, told = num_parameters(sampled), trained.result["parameters"]
    if found != told:
        raise UserError(
            f"run {trained.plan.run_id}",
            f"its result says {told:,} parameters, the network that is sampled has {found:,}",
            remedy=f"restore {trained.folder}, or delete it to train the run again",
        )


def load_weights(weights: Checkpoint, sampled: nn.ModuleDict, ema: str) -> Mapping[str, str]:
    """Load an export into freshly built :func:`sampled_modules`; ``ema`` is an average or ``raw``.

    A power-function average that was not kept is reconstructed from the run's snapshots, whose
    SHA-256 by file name is returned (nothing for averages that were kept).
    """
    snapshots: Mapping[str, str] = {}
    prefix = f"{ema}/"
    state = under(weights.tensors, prefix)
    width = asked_width(ema)
    if not state and width is not None and weights.path.stem == f"weights-{MAIN}":
        folder, meta = weights.path.parent / SNAPSHOTS, weights.meta
        parameters, snapshots = reconstruct(
            folder, width, meta.get("seen_nimg"), meta.get("run", "")
        )
        state = under(weights.tensors, "raw/") | parameters
    expected = {k: tuple(v.shape) for k, v in sampled.state_dict().items()}
    if {k: tuple(v.shape) for k, v in state.items()} != expected:
        raise UserError(
            f"checkpoint {weights.path}",
            f"holds another network: {len(state)} tensors under {prefix!r}, "
            f"{len(expected)} expected",
            allowed="the network that the recipe describes",
            remedy="delete the run's folder to train it again, or correct the recipe",
        )
    sampled.load_state_dict(state)
    return snapshots


# ---- frozen teachers -----------------------------------------------------------------------------


def trained_teacher(
    context: Context, name: str, trained: TrainedRun, student: RunPlan
) -> tuple[Teacher, str]:
    """Return a finished run as a teacher, with its main average, and the hash of its weights."""
    method, modules = build_modules(context, trained.plan, None)
    weights = trained.weights()
    sampled = sampled_modules(method, modules)
    load_weights(weights, sampled, trained.plan.main_average)
    reads, compiled = method.diffusion_model, context.compile
    teacher = frozen_teacher(name, modules, reads, student, sampled=sampled, compiled=compiled)
    return teacher, weights.sha256


def untrained_teacher(context: Context, run: RunPlan, student: RunPlan, build: Builder) -> Teacher:
    """Return a run's networks with their initial weights as a teacher."""
    method, modules = build(context, run, stand_in(context, run, build))
    sampled = method.sampled_modules(modules)
    return frozen_teacher("random", modules, method.diffusion_model, student, sampled=sampled)


def frozen_teacher(
    name: str,
    modules: Mapping[str, nn.Module],
    model: Callable[[Nets], DiffusionModel],
    student: RunPlan,
    *,
    sampled: Iterable[str] = ("model",),
    compiled: bool = False,
) -> Teacher:
    """Return modules as a frozen teacher in the student's precision.

    ``model`` reads the ``sampled`` ones as a diffusion model, and may not use the others.
    """
    precision = student.config.precision
    nets = SampledNetworks(f"teacher {name}", modules, sampled, precision, compiled)
    return Teacher(name, model(nets), modules["model"])


def stand_in(context: Context, student: RunPlan, build: Builder) -> Teacher | None:
    """Return a teacher of the same shapes with random weights; None if there is no teacher."""
    return student.teacher.stand_in(context, student, build) if student.teacher else None
