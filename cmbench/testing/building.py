"""Checks of what ``build`` returns and of the recipes that it is built from."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from cmbench.networks.base import num_parameters
from cmbench.sweep.estimate import built_in_place
from cmbench.sweep.planning import plan_run
from cmbench.sweep.recipes import recipe_names
from cmbench.sweep.runs import build_modules, stand_in
from cmbench.testing.case import Subject
from cmbench.testing.check import CheckFailure


def scramble(seed: int) -> None:
    """Put every global generator somewhere else: nothing may depend on where they are."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def tensors_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers as ``module.name``."""
    states = {name: module.state_dict() for name, module in modules.items()}
    return {f"{n}.{k}": v.clone() for n, state in states.items() for k, v in state.items()}


def first_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor that is not bitwise the same in both."""
    for name in sorted(a | b):
        if name not in a or name not in b or not same(a[name], b[name]):
            return name
    return None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether shapes and all values are equal, NaN included."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def recipes(subject: Subject) -> None:
    """Every recipe for a registered dataset is valid and can be built, in whatever size."""
    context, spec = subject.context, subject.context.plugins.methods.get(subject.name)
    for dataset, recipe in recipe_names(spec):
        if dataset not in context.plugins.datasets.specs:
            continue
        plan = plan_run(context, subject.name, dataset, recipe, 0)
        with torch.device("meta"):
            teacher = None
            if plan.teacher is not None and plan.teacher.run is not None:
                teacher = stand_in(context, plan, built_in_place)
            modules = built_in_place(context, plan, teacher)[1]
        if not num_parameters(modules["model"]):
            raise CheckFailure(f"recipe {dataset}.{recipe} has no parameters", "set its network")


def seeded_build(subject: Subject) -> None:
    """``build`` gives the same weights under one seed, and the same modules for sampling."""
    found = []
    for seed in (1, 2):
        scramble(seed)
        case = subject.case()
        found.append(tensors_of(case.modules))
    different = first_difference(*found)
    if different is not None:
        raise CheckFailure(
            f"two calls of build under one seed differ, first in {different!r}",
            "draw initial weights with torch's generator, not with numpy, random or a clock",
        )
    again = tensors_of(build_modules(subject.context, case.plan, None)[1])
    shapes = [{k: tuple(v.shape) for k, v in tensors.items()} for tensors in (found[0], again)]
    names = [k for k in sorted(shapes[0] | shapes[1]) if shapes[0].get(k) != shapes[1].get(k)]
    if names:
        raise CheckFailure(
            f"build for sampling, where kit.teacher is None, gives other modules than build for "
            f"training: {names[0]!r} is {shapes[1].get(names[0], 'missing')}",
            "return the same modules in both cases; kit.student() does so for the network",
        )
