"""From what a user asks for to runs and cells, each with an identity that its content decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cmbench.errors import Declined, PluginError, UserError
from cmbench.importers.imported import Preconditioning
from cmbench.plugin.config import EMAConfig, MethodConfig
from cmbench.plugin.method import Method, SamplingPlan
from cmbench.plugin.specs import MethodSpec
from cmbench.sweep.context import Context
from cmbench.sweep.failures import method_failure
from cmbench.sweep.imported import (
    PREFIX,
    ImportedModel,
    open_imported,
    require_students_reading,
    with_imported_teacher,
)
from cmbench.sweep.plans import CellPlan, RunPlan, SampleSettings
from cmbench.sweep.recipes import (
    default_recipe,
    merge,
    parse_overrides,
    recipe_table,
    sampling_table,
)
from cmbench.sweep.validation import validate
from cmbench.training.augment import LABEL_DIM
from cmbench.training.distributed import World
from cmbench.training.posthoc import asked_width

ANALYTIC = "analytic"
#: Constants that an imported checkpoint may tell.
_TOLD = ("sigma_data", "sigma_min")
#: Students of every seed share one teacher.
TEACHER_SEED = 0


def plan_run(
    context: Context,
    method: str,
    dataset: str,
    recipe: str | None,
    seed: int,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> RunPlan:
    """Resolve and validate one run and, recursively, its teacher."""
    spec = context.plugins.methods.get(method, "cmbench run")
    data = context.dataset_spec(dataset, "cmbench run")
    dataset = data.name
    method_class = _method_class(context, spec)
    recipe = recipe or default_recipe(spec, dataset)
    extra = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    table = merge(recipe_table(spec, dataset, recipe), extra)
    table = with_imported_teacher(context, table, extra, data)
    config = validate(method_class.Config, table, f"recipe {method}/{dataset}.{recipe}")
    require_students_reading(context, config)
    config = _with_network_options(context, config)
    if round(config.duration_kimg * 1000) < 1:
        raise UserError(
            f"recipe {method}/{dataset}.{recipe}",
            f"duration_kimg {config.duration_kimg:g} trains on no image",
            allowed="from 0.001, one image",
            remedy="give it a length with -o duration_kimg=N",
        )
    if config.conditional and not data.num_classes:
        raise UserError(
            "recipe, conditional",
            f"dataset {dataset!r} has no labels",
            allowed="false",
            remedy="add -o conditional=false, or prepare it from a source with labels",
        )
    if config.microbatch_size is not None:
        list(World().shards(config.batch_size, config.microbatch_size))  # before a teacher's days
    teacher = _plan_teacher(context, config, dataset)
    return RunPlan(spec, dataset, recipe, seed, config, teacher, method_class)


def plan_imported_run(
    context: Context,
    checkpoint: str,
    method: str | None,
    dataset: str,
    recipe: str | None,
    seed: int,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> RunPlan:
    """Plan the sampling of an imported checkpoint by a method that can read it.

    Without ``method`` the first that can is taken. Options of sampling come from ``recipe``, or
    from the method's ``paper`` recipe for the dataset where there is one; the network, its classes
    and its constants from the checkpoint. ``seed`` is that of sampling.
    """
    data = context.dataset_spec(dataset, "cmbench run")
    model = open_imported(context.workspace, checkpoint)
    model.require_data(data)
    spec, meaning = _sampling_method(context, model, method)
    method_class = _method_class(context, spec)
    extra = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    if "network" in extra:
        raise UserError("-o network", "a checkpoint brings its network", remedy="leave it out")
    facts = model.facts
    _refuse_told(extra, {k: getattr(facts, k) for k in _TOLD}, f"imported checkpoint {model.name}")
    table: dict[str, Any] = {
        **merge(sampling_table(spec, data.name, recipe), extra),
        **spec.samples_imported[meaning],
        "network": facts.network,
        "conditional": facts.num_classes > 0,
        "teacher": None,
        "duration_kimg": 0.0,
        "ema": (),
        "augment": 0.0,
    }
    for key in _TOLD:
        told = getattr(facts, key)
        if told is not None and key not in extra and key in method_class.Config.model_fields:
            table[key] = told
    config = validate(method_class.Config, table, f"imported checkpoint {model.name}")
    config = _with_network_options(context, config)
    return RunPlan(spec, data.name, model.name, seed, config, None, method_class, model)


def _refuse_told(extra: Mapping[str, Any], told: Mapping[str, Any], who: str) -> None:
    """Raise ``UserError`` if an option says otherwise what a checkpoint says itself."""
    for key, value in told.items():
        if value is not None and extra.get(key, value) != value:
            raise UserError(
                f"-o {key}={extra[key]}",
                f"{who} has {key} {value:g}",
                allowed=f"{value:g}",
                remedy="leave it out",
            )


def _sampling_method(
    context: Context, model: ImportedModel, method: str | None
) -> tuple[MethodSpec, Preconditioning]:
    """Return the method that samples an imported model, and what the model's output means."""
    specs = context.plugins.methods.specs
    if method is not None:
        spec = context.plugins.methods.get(method, "cmbench run")
        read = dict.fromkeys(spec.samples_imported, f"what {method} samples")
        if not read:
            able = ", ".join(n for n, s in specs.items() if s.samples_imported)
            raise UserError(
                "--method",
                f"{method!r} samples no imported checkpoint",
                allowed=able,
                remedy="choose one of them, or leave --method out",
            )
        return spec, model.require_meaning("--method", read)
    by_meaning = {m: s for s in reversed(specs.values()) for m in s.samples_imported}
    meaning = model.require_meaning(
        "cmbench run", {m: f"sampled by {s.name}" for m, s in by_meaning.items()}
    )
    return by_meaning[meaning], meaning


def _method_class(context: Context, spec: MethodSpec) -> type[Method]:
    loaded: Any = context.plugins.methods.load(spec.name)
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise PluginError(
            f"method {spec.name!r}",
            f"its factory {spec.factory!r} is not a Method class",
            allowed="a subclass of cmbench.plugin.method.Method",
            remedy="fix the plugin",
        )
    if not (isinstance(loaded.Config, type) and issubclass(loaded.Config, MethodConfig)):
        raise PluginError(
            f"method {spec.name!r}",
            f"its Config is {loaded.Config!r}",
            allowed="a subclass of cmbench.plugin.config.MethodConfig",
            remedy="fix the plugin",
        )
    return loaded


def _with_network_options(context: Context, config: MethodConfig) -> MethodConfig:
    """Validate the network's options by its own config and write its defaults out in full."""
    table = dict(config.network)
    name = table.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            "recipe, network",
            "has no name",
            allowed=", ".join(sorted(context.plugins.networks.specs)),
            remedy="set network.name",
        )
    network_class: Any = context.plugins.networks.load(name)
    options = validate(network_class.Config, table, f"network {name!r}", "network.")
    full = {"name": name, **options.model_dump(mode="json")}
    if config.augment > 0 and full.get("augment_dim") != LABEL_DIM:
        raise UserError(
            "recipe",
            f"augment {config.augment:g} with a network that is not told of it "
            f"(network.augment_dim {full.get('augment_dim')}): its samples would be augmented too",
            allowed=f"network.augment_dim {LABEL_DIM}",
            remedy=f"set network.augment_dim={LABEL_DIM}, or augment=0",
        )
    return config.model_copy(update={"network": full})


def _plan_teacher(context: Context, config: MethodConfig, dataset: str) -> RunPlan | None:
    """Plan the teacher that ``METHOD:RECIPE`` names, with the student's architecture and labels."""
    named = config.teacher
    if named is None or named == ANALYTIC or named.startswith(("run:", PREFIX)):
        return None
    method, _, recipe = named.partition(":")
    spec = context.plugins.methods.get(method, "teacher")
    if not spec.is_teacher:
        able = sorted(n for n, s in context.plugins.methods.specs.items() if s.is_teacher)
        raise UserError(
            "teacher",
            f"method {method!r} does not train a diffusion model",
            allowed=", ".join(able),
            remedy="set teacher=METHOD:RECIPE",
        )
    recipe = recipe or default_recipe(spec, dataset)
    own = recipe_table(spec, dataset, recipe)
    network = dict(config.network)
    for key, none in (("dropout", 0.0), ("dropout_max_resolution", None)):
        # The teacher keeps its own dropout; everything that shapes weights is the student's.
        if key in network:
            network[key] = own.get("network", {}).get(key, none)
    extra: dict[str, Any] = {"conditional": config.conditional, "network": network}
    if config.sigma_data is not None:
        extra["sigma_data"] = config.sigma_data
    return plan_run(context, method, dataset, recipe, TEACHER_SEED, extra)


def plan_cells(
    context: Context, run: RunPlan, nfes: Sequence[int], sample_seed: int, settings: SampleSettings
) -> list[CellPlan]:
    """Return the cells of a run's sweep; a method's refusal or failure is part of the plan."""
    spec = context.dataset_spec(run.dataset)
    ema = settings.ema or (run.config.ema[0].label if run.config.ema else "raw")
    known = ["raw", *(e.label for e in run.config.ema)]
    width = asked_width(ema)
    if width is not None and any(e.sigma_rel is not None for e in run.config.ema):
        ema = EMAConfig(sigma_rel=width).label  # one name for 0.1 and .10
    elif ema not in known:
        raise UserError("--ema", f"{ema!r} is not kept by this run", allowed=", ".join(known))
    cells = []
    for nfe in nfes:
        sampling, declined, broken = None, "", ""
        try:
            sampling = _sampling_plan(run, run.method(context), nfe, settings)
        except Declined as reason:
            declined = str(reason) or "the method gives no reason"
        except UserError as error:
            broken = str(error)
        except Exception as error:
            broken = method_failure(run.spec.name, f"planning NFE {nfe}", error)
        cells.append(
            CellPlan(
                run,
                nfe,
                sample_seed,
                settings.num_samples or spec.num_samples,
                settings.batch_size,
                sampling,
                ema,
                declined,
                settings.tuned,
                broken,
                settings.precision,
                (settings.sampler, settings.sigmas) if sampling is None else (None, None),
            )
        )
    return cells


def _sampling_plan(
    run: RunPlan, method: Method, nfe: int, settings: SampleSettings
) -> SamplingPlan:
    """Ask a method how it spends ``nfe`` evaluations and check the answer."""
    plan = method.plan_sampling(nfe, settings.sigmas, settings.sampler)
    who = f"method {run.spec.name!r}, plan_sampling"
    if not isinstance(plan, SamplingPlan):
        raise PluginError(who, f"returned {type(plan).__name__}", allowed="a SamplingPlan")
    if plan.nfe != nfe:
        raise PluginError(
            who,
            f"was asked for NFE {nfe} and plans {plan.nfe!r}",
            allowed=str(nfe),
            remedy="fix the plugin, or raise Declined for a budget it cannot spend",
        )
    sigmas = tuple(float(s) for s in plan.sigmas)
    if not sigmas or not all(math.isfinite(s) and s > 0 for s in sigmas):
        raise PluginError(
            who, f"gives noise levels {sigmas!r}", allowed="at least one, finite and positive"
        )
    return replace(plan, sigmas=sigmas)
