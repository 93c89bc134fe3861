"""Plan runs and cells from a request; the identity of each is a hash of its content."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

from cmbench.errors import Declined, PluginError, UserError
from cmbench.importers.imported import Parameterization
from cmbench.plugin.config import EMAConfig, MethodConfig
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.method import Method, SamplingPlan
from cmbench.plugin.specs import DatasetSpec, MethodSpec
from cmbench.records.options import dotted
from cmbench.sweep.context import Context
from cmbench.sweep.failures import method_failure
from cmbench.sweep.imported import ImportedModel, open_imported
from cmbench.sweep.plans import (
    RAW,
    CellPlan,
    RunPlan,
    SampleSettings,
    TeacherSource,
    load_method_class,
)
from cmbench.sweep.protocol import further_metrics
from cmbench.sweep.recipes import (
    default_recipe,
    merge,
    parse_overrides,
    recipe_table,
    require_unchanged,
    sampling_table,
)
from cmbench.sweep.teachers import resolve_teacher
from cmbench.sweep.validation import validate
from cmbench.training.augment import LABEL_DIM
from cmbench.training.distributed import World
from cmbench.training.posthoc import asked_width

#: What a cell says when its method has raised ``Declined`` without a text.
NO_REASON = "the method gives no reason"
#: Constants that an imported checkpoint may give.
_FIXED = ("sigma_data", "sigma_min")


def plan_run(
    context: Context,
    method: str,
    dataset: str,
    recipe: str | None,
    seed: int,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> RunPlan:
    """Resolve and validate one run and, recursively, its teacher."""
    spec = context.plugins.methods.get(method, context.verb)
    data = context.dataset_spec(dataset, context.verb)
    dataset = data.name
    method_class = load_method_class(context.plugins, spec)
    recipe = recipe or default_recipe(spec, dataset)
    extra = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    base = recipe_table(spec, dataset, recipe)
    table = merge(base, extra)
    _require_no_idle_teacher(spec, table.get("teacher"))
    teacher, table = resolve_teacher(context, table, extra, data)
    config = validate(method_class.Config, table, f"recipe {method}/{dataset}.{recipe}")
    config = with_network_options(context.plugins, config)
    _require_trainable(config, data, f"recipe {method}/{dataset}.{recipe}")
    if teacher is not None:
        teacher = teacher.planned(context, config, dataset, plan_run)
        _require_same_parameterization(teacher, config)
    changed = _changed(context, base, extra, config)
    return RunPlan(spec, dataset, recipe, seed, config, teacher, method_class, overrides=changed)


def _require_no_idle_teacher(spec: MethodSpec, named: object) -> None:
    if named is not None and not spec.needs_teacher:
        raise UserError(
            "recipe, teacher",
            f"method {spec.name!r} trains without a teacher, so {named!r} would be ignored",
            allowed="no teacher; its plugin declares needs_teacher where there is one",
            remedy="leave teacher out, or choose a method that needs one",
        )


def _require_trainable(config: MethodConfig, data: DatasetSpec, who: str) -> None:
    """Raise ``UserError`` for what would fail only after a teacher's days of training."""
    if round(config.duration_kimg * 1000) < 1:
        raise UserError(
            who,
            f"duration_kimg {config.duration_kimg:g} is shorter than one image",
            allowed="from 0.001, one image",
            remedy="give it a length with -o duration_kimg=N",
        )
    if config.conditional and not data.num_classes:
        raise UserError(
            "recipe, conditional",
            f"dataset {data.name!r} has no labels",
            allowed="false",
            remedy="add -o conditional=false, or prepare it from a source with labels",
        )
    if config.microbatch_size is not None:
        list(World().shards(config.batch_size, config.microbatch_size))


def _changed(
    context: Context, base: Mapping[str, Any], extra: Mapping[str, Any], config: MethodConfig
) -> dict[str, Any]:
    """Return the values of ``config`` by which ``extra`` differs from the recipe, by dotted key.

    An override that states what the recipe has anyway is none: it makes the same run.
    """
    if not extra:
        return {}
    try:
        usual = with_network_options(context.plugins, validate(type(config), base, "recipe"))
        before = dict(dotted(usual.model_dump(mode="json")))
    except UserError:  # complete only with the overrides, or with what the teacher determines
        before = dict(dotted(base))
    after = dict(dotted(config.model_dump(mode="json")))
    given = ((key, after.get(key, value)) for key, value in dotted(extra))
    return {key: value for key, value in given if key not in before or before[key] != value}


def plan_imported_run(
    context: Context,
    checkpoint: str,
    method: str | None,
    dataset: str,
    recipe: str | None,
    seed: int,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> RunPlan:
    """Plan the sampling of an imported checkpoint by a method that supports it.

    Without ``method`` the first one that can is used. Options of sampling come from ``recipe``, or
    from the method's ``paper`` recipe for the dataset where there is one; the network, its classes
    and its constants from the checkpoint. ``seed`` is that of sampling.
    """
    data = context.dataset_spec(dataset, context.verb)
    model = open_imported(context.workspace, checkpoint)
    model.require_data(data)
    spec, parameterization = sampling_method(context, model, method)
    method_class = load_method_class(context.plugins, spec)
    extra = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    if "network" in extra:
        raise UserError("-o network", "the network is the checkpoint's", remedy="leave it out")
    facts = model.facts
    fixed = {key: getattr(facts, key) for key in _FIXED}
    require_unchanged(extra, fixed, f"imported checkpoint {model.name}")
    fields = method_class.Config.model_fields
    base = sampling_table(spec, data.name, recipe)
    facts_of_model: dict[str, Any] = {
        **spec.samples_imported[parameterization],
        "network": facts.network,
        "conditional": facts.num_classes > 0,
        "teacher": None,
        "duration_kimg": 0.0,
        "ema": (),
        "augment": 0.0,
        **{key: value for key, value in fixed.items() if value is not None and key in fields},
    }
    table = {**merge(base, extra), **facts_of_model}
    config = validate(method_class.Config, table, f"imported checkpoint {model.name}")
    config = with_network_options(context.plugins, config)
    changed = _changed(context, {**base, **facts_of_model}, extra, config)
    return RunPlan(spec, data.name, model.name, seed, config, None, method_class, model, changed)


def sampling_method(
    context: Context, model: ImportedModel, method: str | None
) -> tuple[MethodSpec, Parameterization]:
    """Return the method that samples an imported model, and how the model's output is read."""
    specs = context.plugins.methods.specs
    if method is not None:
        spec = context.plugins.methods.get(method, context.verb)
        if not spec.samples_imported:
            raise UserError(
                "--method",
                f"{method!r} samples no imported checkpoint",
                allowed=", ".join(n for n, s in specs.items() if s.samples_imported),
                remedy="choose one of them, or leave --method out",
            )
        words = dict.fromkeys(spec.samples_imported, f"what {method} samples")
        return spec, model.require_parameterization("--method", words)
    able = {p: s for s in reversed(specs.values()) for p in s.samples_imported}
    words = {p: f"sampled by {s.name}" for p, s in able.items()}
    found = model.require_parameterization(context.verb, words)
    return able[found], found


def network_name(plugins: PluginManager, table: Mapping[str, Any]) -> str:
    """Return a network's name in a recipe; raise ``UserError`` if it has none."""
    name = table.get("name")
    if isinstance(name, str):
        return name
    raise UserError(
        "recipe, network",
        "has no name",
        allowed=", ".join(sorted(plugins.networks.specs)),
        remedy="set network.name",
    )


def with_network_options(plugins: PluginManager, config: MethodConfig) -> MethodConfig:
    """Validate the network's options by its own config and write its defaults out in full."""
    name = network_name(plugins, config.network)
    table = {key: value for key, value in config.network.items() if key != "name"}
    network_class: Any = plugins.networks.load(name)
    options = validate(network_class.Config, table, f"network {name!r}", "network.")
    full = {"name": name, **options.model_dump(mode="json")}
    if config.augment > 0 and full.get("augment_dim") != LABEL_DIM:
        raise UserError(
            "recipe",
            f"augment {config.augment:g} with a network that does not receive its labels "
            f"(network.augment_dim {full.get('augment_dim')}): samples would be augmented",
            allowed=f"network.augment_dim {LABEL_DIM}",
            remedy=f"set network.augment_dim={LABEL_DIM}, or augment=0",
        )
    return config.model_copy(update={"network": full})


def _require_same_parameterization(teacher: TeacherSource, student: MethodConfig) -> None:
    """Raise ``UserError`` if a student would read the teacher's weights as those of another model.

    A method says how the output of its network is read by an option ``parameterization``, if there
    is a choice.
    """
    theirs, ours = teacher.parameterization, getattr(student, "parameterization", None)
    choices = get_args(type(student).model_fields["parameterization"].annotation) if ours else ()
    if theirs in choices and ours != theirs:
        raise UserError(
            f"teacher {teacher.reference}",
            f"its parameterization is {theirs!r}",
            allowed=f"{ours!r} for this student",
            remedy=f"add -o parameterization={theirs}, or name another teacher",
        )


def plan_cells(
    context: Context, run: RunPlan, nfes: Sequence[int], sample_seed: int, settings: SampleSettings
) -> list[CellPlan]:
    """Return the cells of a run; what its method declines, or fails to plan, is a cell too."""
    spec = context.dataset_spec(run.dataset)
    ema = _average(run, settings)
    further = further_metrics(context, spec, settings.metrics)
    cells = []
    for nfe in nfes:
        sampling, declined, broken = None, "", ""
        changed: dict[str, Any] = {"ema": ema} if ema != run.main_average else {}
        try:
            method = run.method(context)
            sampling = _sampling_plan(run, method, nfe, settings)
            changed |= _sampling_changed(run, method, sampling, settings)
        except Declined as reason:
            declined = str(reason) or NO_REASON
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
                changed,
                further,
                settings.labels if run.config.conditional else "drawn",
            )
        )
    return cells


def _average(run: RunPlan, settings: SampleSettings) -> str:
    """Return the label of the average that is sampled; raise ``UserError`` for one not kept."""
    ema = settings.ema or run.main_average
    known = [RAW, *(e.label for e in run.config.ema)]
    width = asked_width(ema)
    if width is not None and any(e.sigma_rel is not None for e in run.config.ema):
        ema = EMAConfig(sigma_rel=width).label  # one name for 0.1 and .10
    elif ema not in known:
        raise UserError("--ema", f"{ema!r} is not kept by this run", allowed=", ".join(known))
    return ema


def _sampling_changed(
    run: RunPlan, method: Method, plan: SamplingPlan, settings: SampleSettings
) -> dict[str, Any]:
    """Return sampler and noise levels where the user chose others than the method does.

    Tuned noise levels are marked as such.
    """
    own_sigmas = settings.sigmas is not None and settings.tuned is None
    if settings.sampler is None and not own_sigmas:
        return {}

    def usual(sampler: str | None) -> SamplingPlan | None:
        try:
            return _sampling_plan(run, method, plan.nfe, SampleSettings(sampler=sampler))
        except Exception:  # what was asked for can be planned: only the usual way cannot
            return None

    changed: dict[str, Any] = {}
    first, second = usual(None), usual(settings.sampler)
    if settings.sampler is not None and (first is None or first.sampler != plan.sampler):
        changed["sampler"] = plan.sampler
    if own_sigmas and (second is None or second.sigmas != plan.sigmas):
        changed["sigmas"] = list(plan.sigmas)
    return changed


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
    ordered = all(a >= b for a, b in pairwise(sigmas))
    if not ordered or not all(s > 0 for s in sigmas) or math.inf in sigmas[1:]:
        raise PluginError(
            who,
            f"gives noise levels {sigmas!r}",
            allowed="descending positive ones, the first perhaps infinite, or none at all",
        )
    return replace(plan, sigmas=sigmas)
