"""The runs that a sweep asks of one method: one per combination of option values and per seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cmbench.plugin.specs import MethodSpec
from cmbench.records.options import AnyOf
from cmbench.sweep.combinations import combinations, require_few
from cmbench.sweep.context import Context
from cmbench.sweep.imported import open_imported
from cmbench.sweep.planning import plan_imported_run, plan_run, sampling_method
from cmbench.sweep.plans import RunPlan, load_method_class
from cmbench.sweep.recipes import (
    Table,
    default_recipe,
    parse_overrides,
    recipe_table,
    sampling_table,
)
from cmbench.sweep.validation import takes_list

_NETWORK = "network."
_NAME = "network.name"


def plan_runs(
    context: Context,
    method: str | None,
    dataset: str,
    recipe: str | None,
    seeds: Sequence[int],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    checkpoint: str | None = None,
) -> list[RunPlan]:
    """Plan a method's runs, each once, in the order of option values and seeds.

    With ``checkpoint`` that is sampled, by ``method`` or by the first one that can.
    """
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides, several=True)
    plan = partial(_plan, context, method, dataset, recipe, checkpoint)
    tables = [dict(overrides)]
    if overrides:
        listed = _lists_of(context, method, dataset, recipe, checkpoint, overrides)
        tables = combinations(overrides, listed)
    require_few([("options", tables)], len(seeds))
    runs = [plan(seed, table) for table in tables for seed in seeds]
    return list({run.run_id: run for run in runs}.values())


def _plan(
    context: Context,
    method: str | None,
    dataset: str,
    recipe: str | None,
    checkpoint: str | None,
    seed: int,
    overrides: Table,
) -> RunPlan:
    """Plan a training, or the sampling of a checkpoint from elsewhere."""
    if checkpoint is not None:
        return plan_imported_run(context, checkpoint, method, dataset, recipe, seed, overrides)
    assert method is not None
    return plan_run(context, method, dataset, recipe, seed, overrides)


def _lists_of(
    context: Context,
    method: str | None,
    dataset: str,
    recipe: str | None,
    checkpoint: str | None,
    overrides: Mapping[str, Any],
) -> Callable[[str], bool]:
    """Return what says of an option, by its dotted key, whether it takes a list."""
    dataset = context.dataset_spec(dataset, context.verb).name
    if checkpoint is not None:
        spec, _ = sampling_method(context, open_imported(context.workspace, checkpoint), method)
        base = sampling_table(spec, dataset, recipe)
    else:
        assert method is not None
        spec = context.plugins.methods.get(method, context.verb)
        base = recipe_table(spec, dataset, recipe or default_recipe(spec, dataset))
    return partial(_takes_list, context, spec, _networks(base, overrides))


def _networks(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the networks that an option ``network.KEY`` may be one of."""
    given = overrides.get("network")
    name = given.get("name") if isinstance(given, Mapping) else None
    name = name or base.get("network", {}).get("name")
    names = name.values if isinstance(name, AnyOf) else name
    return tuple(names) if isinstance(names, list | tuple) else (names,)


def _takes_list(context: Context, spec: MethodSpec, networks: Sequence[str], key: str) -> bool:
    if key == _NAME:
        return False
    inner = key.removeprefix(_NETWORK)
    if inner == key:
        return takes_list(load_method_class(context.plugins, spec).Config, key)
    known = [name for name in networks if name in context.plugins.networks.specs]
    classes: list[Any] = [context.plugins.networks.load(name) for name in known]
    return not classes or any(takes_list(one.Config, inner) for one in classes)
