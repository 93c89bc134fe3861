"""Checks of what a method's plugin returns, made before any training.

Every error is a ``PluginError`` that names the method, what it returned and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from cmbench.errors import PluginError, UserError
from cmbench.plugin.config import EMAConfig, OptimizerConfig
from cmbench.plugin.method import GeneratedData, Method, Objective, Phase

#: Exports become file names.
_EXPORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_MODULE = re.compile(r"\w+")


def checked_modules(method: Method, modules: object) -> dict[str, nn.Module]:
    """Return what ``build`` returned; raise unless it is modules by name, with a ``"model"``."""
    found: Any = modules
    named = isinstance(found, Mapping) and all(
        isinstance(name, str) and _MODULE.fullmatch(name) and isinstance(module, nn.Module)
        for name, module in found.items()
    )
    if not named or "model" not in found:
        shown = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise _broken(
            method,
            f"its build returned {shown}",
            "a dict of torch.nn.Module by names of letters, digits and _, with at least 'model'",
        )
    return dict(found)


def sampled_modules(method: Method, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Return the modules that a method's sampling uses, by name."""
    names: Any = method.sampled_modules(modules)
    if isinstance(names, str) or not {"model"} <= {*names} <= modules.keys():
        raise _broken(
            method,
            f"its sampled_modules returned {names!r}",
            f"a tuple with 'model' and any of {_listed(modules)}",
        )
    return nn.ModuleDict({name: modules[name] for name in names})


def checked_phases(method: Method, modules: Mapping[str, nn.Module]) -> list[Phase]:
    """Return a method's phases; raise unless each can be trained and exported."""
    found: Any = method.phases(modules)
    if not isinstance(found, list | tuple) or not all(isinstance(p, Phase) for p in found):
        raise _broken(method, f"its phases returned {found!r}", "a list of Phase")
    if not found:
        raise _broken(method, "its phases returned no phase", "at least one Phase")
    for phase in found:
        _check_phase(method, phase, modules)
    exports = [phase.export for phase in found if phase.export is not None]
    if len({*exports}) < len(exports):
        raise _broken(method, f"its phases have the exports {exports}", "each export once")
    return list(found)


def _check_phase(method: Method, phase: Phase, modules: Mapping[str, nn.Module]) -> None:
    who = f"its phase {phase.name!r} has"
    if not isinstance(phase.images, int) or phase.images < 1:
        raise _broken(method, f"{who} {phase.images!r} images", "a whole number from 1")
    if phase.export is not None and not _EXPORT.fullmatch(phase.export):
        allowed = "up to 60 letters, digits and . _ -, beginning with a letter or digit"
        raise _broken(method, f"{who} the export {phase.export!r}", allowed)
    if not all(isinstance(average, EMAConfig) for average in phase.ema):
        raise _broken(method, f"{who} the averages {phase.ema!r}", "a tuple of EMAConfig")
    if not phase.objectives or not all(isinstance(o, Objective) for o in phase.objectives):
        raise _broken(method, f"{who} the objectives {phase.objectives!r}", "one Objective or more")
    for objective in phase.objectives:
        _check_objective(method, who, objective, modules)
    if phase.generated is not None:
        _check_generated(method, who, phase, modules)


def _check_generated(
    method: Method, who: str, phase: Phase, modules: Mapping[str, nn.Module]
) -> None:
    wanted: Any = phase.generated
    if not isinstance(wanted, GeneratedData):
        raise _broken(method, f"{who} the generated data {wanted!r}", "a GeneratedData")
    for name, least in (("count", 1), ("states", 1), ("nfe", 0)):
        number = getattr(wanted, name)
        if (name, number) != ("nfe", None) and not (isinstance(number, int) and number >= least):
            raise _broken(method, f"{who} generated data with {name} {number!r}", f"from {least}")
    if wanted.dtype not in ("float16", "float32"):
        raise _broken(method, f"{who} generated data in {wanted.dtype!r}", "float16 or float32")
    if not isinstance(wanted.solver, str) or not wanted.solver:
        allowed = "a text that names how they are made, with every setting"
        raise _broken(method, f"{who} generated data by the solver {wanted.solver!r}", allowed)
    trained = {name for objective in phase.objectives for name in objective.trains}
    makers: Any = wanted.made_by
    if isinstance(makers, str) or not {*makers} <= modules.keys() - trained:
        allowed = f"a tuple of any of {_listed(modules.keys() - trained) or 'none'}, not trained"
        raise _broken(method, f"{who} generated data made by {makers!r}", allowed)


def _check_objective(
    method: Method, who: str, objective: Objective, modules: Mapping[str, nn.Module]
) -> None:
    trains: Any = objective.trains
    if isinstance(trains, str) or not trains or not {*trains} <= modules.keys():
        allowed = f"a tuple of any of {_listed(modules)}, which its build returned"
        raise _broken(method, f"{who} an objective that trains {trains!r}", allowed)
    if not any(True for name in trains for _ in modules[name].parameters()):
        raise _broken(method, f"{who} an objective whose modules have no parameters", "some")
    if not isinstance(objective.every, int) or objective.every < 1:
        raise _broken(method, f"{who} an objective every {objective.every!r} steps", "from 1")
    if not isinstance(objective.group, int) or objective.group < 1:
        raise _broken(method, f"{who} an objective of groups of {objective.group!r}", "from 1")
    if not isinstance(objective.optimizer, OptimizerConfig):
        raise _broken(method, f"{who} the optimizer {objective.optimizer!r}", "an OptimizerConfig")


def require_variants(method: Method, phases: Iterable[Phase], variants: Collection[str]) -> None:
    """Raise unless phases export every variant that sampling plans name; ``""`` is the end."""
    exports = {phase.export for phase in phases if phase.export is not None}
    unknown = sorted({*variants} - exports - {""})
    if unknown:
        allowed = f"{_listed(exports)}, or no variant" if exports else "no variant"
        raise _broken(method, f"its plan_sampling names the variant {unknown[0]!r}", allowed)


def require_whole_groups(phases: Iterable[Phase], shard: int) -> None:
    """Raise ``UserError`` if shards of a batch would cut the groups of an objective."""
    for phase in phases:
        for objective in phase.objectives:
            if shard % objective.group:
                raise UserError(
                    f"phase {phase.name!r}",
                    f"shards of {shard} images cut its loss's groups of {objective.group}",
                    allowed=f"a multiple of {objective.group} images per forward pass and process",
                    remedy="choose batch_size or microbatch_size accordingly",
                )


def _listed(modules: Iterable[str]) -> str:
    return ", ".join(sorted(modules))


def _broken(method: Method, problem: str, allowed: str) -> PluginError:
    who = f"method {type(method).__name__}"
    return PluginError(who, problem, allowed=allowed, remedy="fix the plugin")
