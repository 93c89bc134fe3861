"""Networks as frozen teachers: finished runs, checkpoints, and stand-ins with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from cmbench.diffusion.models import DiffusionModel
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Nets, Teacher
from cmbench.sweep.context import Context
from cmbench.sweep.plans import Builder, RunPlan
from cmbench.sweep.runs import TrainedRun, build_modules, load_weights


def trained_teacher(
    context: Context, name: str, trained: TrainedRun, student: RunPlan
) -> tuple[Teacher, str]:
    """Return a finished run as a teacher, with its main average, and the hash of its weights."""
    method, modules = build_modules(context, trained.plan, None)
    weights = trained.weights()
    load_weights(weights, modules, trained.plan.main_average)
    teacher = frozen_teacher(
        name, modules, method.diffusion_model, student, compiled=context.compile
    )
    return teacher, weights.sha256


def untrained_teacher(context: Context, run: RunPlan, student: RunPlan, build: Builder) -> Teacher:
    """Return a run's networks with their initial weights as a teacher."""
    method, modules = build(context, run, stand_in(context, run, build))
    return frozen_teacher("random", modules, method.diffusion_model, student)


def frozen_teacher(
    name: str,
    modules: Mapping[str, nn.Module],
    model: Callable[[Nets], DiffusionModel],
    student: RunPlan,
    *,
    compiled: bool = False,
) -> Teacher:
    """Return modules as a frozen teacher in the student's precision."""
    for module in modules.values():
        module.eval().requires_grad_(False)
    precision = student.config.precision
    nets = {n: CountedNetwork(m, precision, compiled) for n, m in modules.items()}
    return Teacher(name, model(nets), modules["model"])


def stand_in(context: Context, student: RunPlan, build: Builder) -> Teacher | None:
    """Return a teacher of the same shapes with random weights; None if there is no teacher."""
    return student.teacher.stand_in(context, student, build) if student.teacher else None
