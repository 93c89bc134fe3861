"""Builds any registered method on tiny networks, the way the harness does, without training.

Used by every test of this folder: one list of methods, from the registry, through shared checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.errors import Declined
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.plugin.method import Batch, DataInfo, Method, Progress, SamplingPlan, Teacher
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import TrainingKit, build_modules, seeded
from cmbench.sweep.training_run import obtain_teacher
from cmbench.training.state import TrainingState

DATASETS = ("digits", "gmm")
TINY: dict[str, dict[str, Any]] = {
    "digits": {"channels": 8, "blocks": 1},
    "gmm": {"width": 16, "blocks": 1, "embedding_dim": 8},
}


@cache
def plugins() -> PluginManager:
    """Load the installed plugins once."""
    return load_plugins()


def context() -> Context:
    """Return a context that writes nowhere."""
    return Context(plugins(), Workspace(Path("nowhere")), device=torch.device("cpu"), threads=1)


def method_names() -> list[str]:
    """Return every registered method."""
    return sorted(plugins().methods.specs)


def stir(modules: Mapping[str, nn.Module], seed: int = 0, size: float = 0.05) -> None:
    """Give every parameter a random part: zero-initialised layers hide errors and gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(modules):
            for parameter in modules[name].parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter))


def untrained_teacher(plan: RunPlan) -> Teacher | None:
    """Return the teacher a plan names, with random weights where it would be trained."""
    if plan.teacher is None or plan.teacher.run is None:
        return obtain_teacher(context(), plan)
    method, modules = build_modules(context(), plan.teacher.run, None)
    stir(modules, 1)
    for module in modules.values():
        module.eval().requires_grad_(False)
    nets = {name: CountedNetwork(module) for name, module in modules.items()}
    return Teacher(plan.teacher.run_id, method.diffusion_model(nets), modules["model"])


@dataclass
class Case:
    """A method, built."""

    plan: RunPlan
    method: Method
    modules: dict[str, nn.Module]
    teacher: Teacher | None
    data: DataInfo = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.method.data

    @property
    def nets(self) -> dict[str, CountedNetwork]:
        """The modules as a loss receives them."""
        return {name: CountedNetwork(module) for name, module in self.modules.items()}

    def state(self) -> TrainingState:
        """Return the training state, in no phase yet."""
        return TrainingState(self.method, self.modules)

    def batch(self, count: int = 6, seed: int = 0) -> Batch:
        """Return training images of the right shape."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn((count, *self.data.data_shape), generator=generator) / 2
        classes = self.data.num_classes
        labels = torch.arange(count) % classes if classes else None
        return Batch(images.clamp(-1, 1), labels)


def build(
    name: str,
    dataset: str = "digits",
    *,
    conditional: bool = False,
    recipe: str = "smoke",
    plugin_manager: PluginManager | None = None,
    **overrides: Any,
) -> Case:
    """Build a method from its recipe with a tiny network, stirred weights and stirred teacher."""
    ctx = context()
    if plugin_manager is not None:
        ctx.plugins = plugin_manager
    network = {**TINY[dataset], **overrides.pop("network", {})}
    table = {"network": network, "conditional": conditional, **overrides}
    plan = plan_run(ctx, name, dataset, recipe, 0, table)
    teacher = untrained_teacher(plan)
    method = plan.method(ctx)
    with seeded(plan.seed, "modules"):
        modules = method.build(TrainingKit(ctx, plan, method.data, teacher))
    stir(modules, 2)
    return Case(plan, method, modules, teacher)


def progress(step: int = 3, total_steps: int = 10, batch: int = 6) -> Progress:
    """Return a place in the middle of training."""
    return Progress(step * batch, total_steps * batch, step, total_steps)


def plan_or_reason(method: Method, nfe: int) -> SamplingPlan | str:
    """Return the plan of an NFE budget, or why the method declines it."""
    try:
        return method.plan_sampling(nfe)
    except Declined as reason:
        return str(reason)


@dataclass
class FixedDraws:
    """Draws that a test has chosen, by name."""

    values: Mapping[str, Tensor]

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return the chosen numbers."""
        return self.values[name].to(like).reshape(like.shape)

    uniform = normal


def data_of(shape: tuple[int, int, int], sigma_data: float = 0.5) -> DataInfo:
    """Return facts of unconditional data."""
    return DataInfo("test", shape, 0, sigma_data, bounded=False)


def exact_teacher(model: Any) -> Teacher:
    """Return a teacher without a network."""
    return Teacher("exact", model, None)
