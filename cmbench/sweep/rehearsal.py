"""A student built before its teacher is obtained: what would fail after days fails at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from cmbench.errors import PluginError, blaming
from cmbench.sweep.context import Context
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import build_modules, stand_in
from cmbench.training.contract import checked_phases, require_variants, sampled_modules


def rehearse(context: Context, plan: RunPlan, variants: Collection[str]) -> None:
    """Build a run as for training, with a teacher of random weights, and as for sampling.

    On the CPU, and thrown away. ``variants`` are those that its cells will sample.

    Raises:
        PluginError: what the method returns is refused, it cannot be built without its teacher, or
            is another network then.
        UserError: it does not fit its teacher.
    """
    here = replace(context, device=torch.device("cpu"))
    method, modules = build_modules(here, plan, stand_in(here, plan, build_modules))
    require_variants(method, checked_phases(method, modules), variants)
    trained = _shapes(sampled_modules(method, modules))
    who = f"method {type(method).__name__}"
    remedy = "build what starts from the teacher with kit.student, which is right in sampling too"
    with blaming(who, "its build fails without a teacher, as in sampling:", remedy=remedy):
        method, modules = build_modules(here, plan, None)
    sampled = _shapes(sampled_modules(method, modules))
    differing = sorted(k for k in trained | sampled if trained.get(k) != sampled.get(k))
    if differing:
        first = differing[0]
        raise PluginError(
            who,
            f"its build without a teacher, as in sampling, makes other modules: {first} is "
            f"{sampled.get(first, 'missing')}, in training {trained.get(first, 'missing')}",
            allowed="the same sampled modules with and without a teacher",
            remedy=remedy,
        )


def _shapes(modules: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in modules.state_dict().items()}
