"""Where a student's teacher comes from: the four forms of a recipe's ``teacher``.

``METHOD:RECIPE`` is trained first, with the student's architecture. ``run:PATH`` is a finished run
of this or another workspace and ``import:NAME`` an imported checkpoint: the student has their
architecture. ``analytic`` is the exact model of a dataset with a closed form.

A resolved recipe refers to content, not to a path: ``run:PATH`` becomes ``run:ID@HASH``,
``import:NAME`` becomes ``import:NAME@HASH``. Planning and training need the content again. `eval`
and `verify` open a finished student without its teacher.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from cmbench.diffusion.models import DiffusionModel, EDMModel, MixtureModel
from cmbench.errors import MissingError, UserError
from cmbench.files import expanded
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.method import Nets, Teacher
from cmbench.plugin.specs import DatasetSpec, MethodSpec
from cmbench.sweep.context import Context
from cmbench.sweep.imported import ImportedModel, is_import, open_imported, require_same_data
from cmbench.sweep.plans import Builder, PlanRun, RunPlan, TeacherSource, load_method_class
from cmbench.sweep.recipes import Table, default_recipe, merge, recipe_table, require_unchanged
from cmbench.sweep.run_files import MAIN, RUN_FILE, read_run_file, require_described, weights_path
from cmbench.sweep.runs import (
    TrainedRun,
    frozen_teacher,
    on_device,
    read_result,
    trained_teacher,
    untrained_teacher,
)
from cmbench.sweep.validation import validate
from cmbench.training.checkpoint import read_manifest

_ANALYTIC = "analytic"
_RUN = "run:"
#: Students of every seed share one teacher.
_SEED = 0
#: Network options of a student's own, at their values for none: they act in training or start at 0.
_OWN: Table = {"dropout": 0.0, "label_dropout": 0.0, "conditions": (), "states": 1}
_OWN["dropout_max_resolution"] = None
#: Hexadecimal digits of the content hash in a reference.
_DIGITS = 16


def parse_teacher(text: str | None, run_id: str | None = None) -> TeacherSource | None:
    """Return the source for a recipe's ``teacher``; nothing is looked up yet.

    ``run_id`` is the id of the run that ``METHOD:RECIPE`` refers to, if it is known.
    """
    if text is None:
        return None
    if text == _ANALYTIC:
        return _Analytic(text)
    if text.startswith(_RUN):
        return _FinishedRun(text)
    if is_import(text):
        return _Imported(text)
    return _TrainedFirst(text, run_id=run_id)


def resolve_teacher(
    context: Context, table: Table, extra: Mapping[str, Any], data: DatasetSpec
) -> tuple[TeacherSource | None, Table]:
    """Return a recipe's teacher, and the recipe with the options that the teacher determines.

    ``extra`` are the user's overrides, which ``table`` already contains.
    """
    named = table.get("teacher")
    teacher = parse_teacher(named) if isinstance(named, str) else None
    if not isinstance(teacher, _Given):
        return teacher, table
    found = teacher.found(context, data)
    return found, found.student_table(table, extra)


def saved_plan(context: Context, saved: Mapping[str, Any]) -> RunPlan:
    """Return the plan of a run from its description: neither recipe nor teacher is needed.

    ``saved`` has the entries of ``run.json``: ``method``, ``dataset``, ``recipe``, ``seed``, the
    resolved ``config``, the ``teacher``'s name and, since version 3 of records, ``overrides``.
    """
    spec = context.plugins.methods.get(saved["method"], "run")
    method_class = load_method_class(context.plugins, spec)
    who = f"run of {spec.name!r} on {saved['dataset']!r}"
    config = validate(method_class.Config, saved["config"], who)
    teacher = parse_teacher(config.teacher, saved["teacher"])
    dataset, recipe, seed = str(saved["dataset"]), str(saved["recipe"]), int(saved["seed"])
    overrides = saved.get("overrides")
    return RunPlan(spec, dataset, recipe, seed, config, teacher, method_class, overrides=overrides)


def stored_plan(context: Context, folder: Path) -> RunPlan:
    """Return the plan of the run in a folder; raise ``UserError`` if it is named after another."""
    plan = saved_plan(context, read_run_file(folder))
    require_described(folder, plan.run_id)
    return plan


def saved_run(
    context: Context, folder: Path, remedy: str = "finish it with `cmbench run` first"
) -> TrainedRun:
    """Return the finished run in a folder of this or another workspace.

    Raises:
        MissingError: there is no run, or it is not finished; ``remedy`` ends the message.
    """
    plan = stored_plan(context, folder)
    trained = read_result(plan, folder)
    if trained is None:
        raise MissingError(f"run {folder}", "is not finished", remedy=remedy)
    return trained


# ---- the kinds -----------------------------------------------------------------------------------


class _Analytic(TeacherSource):
    """The exact model of the student's dataset."""

    def open(self, context: Context, student: RunPlan) -> Teacher:
        mixture = getattr(context.dataset(student.dataset), "mixture", None)
        if mixture is None:
            raise UserError(
                "teacher",
                f"dataset {student.dataset!r} has no closed form",
                allowed="analytic datasets (gmm)",
                remedy="set teacher=METHOD:RECIPE",
            )
        sigma_data = student.data_info(context).sigma_data
        return Teacher(self.reference, MixtureModel(mixture.to(context.device), sigma_data), None)

    def stand_in(self, context: Context, student: RunPlan, build: Builder) -> Teacher:
        with unset_fake_temporarily():  # its constants are real numbers; the first call keeps them
            teacher = self.open(context, student)
            shape = student.data_info(context).data_shape
            x = torch.zeros(1, *shape, device=context.device)
            teacher.model.denoise(x, torch.ones(1, device=context.device))
        return teacher


class _TrainedFirst(TeacherSource):
    """A run of this workspace: ``METHOD:RECIPE`` with the student's architecture and labels."""

    @property
    def parameterization(self) -> str | None:
        return _parameterization(self.run) if self.run else None

    def planned(
        self, context: Context, config: MethodConfig, dataset: str, plan_run: PlanRun
    ) -> TeacherSource:
        method, _, recipe = self.reference.partition(":")
        spec = context.plugins.methods.get(method, "teacher")
        _require_diffusion_model(context, spec)
        recipe = recipe or default_recipe(spec, dataset)
        own = recipe_table(spec, dataset, recipe).get("network", {})
        # The teacher keeps its own dropout; everything that shapes weights is the student's.
        kept = {k: own.get(k, none) for k, none in _OWN.items() if k in config.network}
        extra = {"conditional": config.conditional, "network": {**config.network, **kept}}
        if config.sigma_data is not None:
            extra["sigma_data"] = config.sigma_data
        run = plan_run(context, method, dataset, recipe, _SEED, extra)
        return replace(self, run=run, run_id=run.run_id)

    def open(self, context: Context, student: RunPlan) -> Teacher:
        assert self.run_id is not None, "known once it is planned"
        trained = saved_run(context, context.workspace.run(self.run_id))
        return trained_teacher(context, self.run_id, trained, student)[0]

    def stand_in(self, context: Context, student: RunPlan, build: Builder) -> Teacher:
        assert self.run is not None, "only planned runs are estimated"
        return untrained_teacher(context, self.run, student, build)


@dataclass(frozen=True)
class _Facts:
    """The properties of an existing teacher that its student adopts."""

    who: str
    network: Mapping[str, Any]
    conditional: bool
    sigma_data: float | None
    parameterization: str | None


@dataclass(frozen=True)
class _Given(TeacherSource):
    """A teacher that exists already: its student has its architecture."""

    looks_up = True

    facts: _Facts | None = field(default=None, compare=False)

    @abstractmethod
    def found(self, context: Context, data: DatasetSpec) -> _Given:
        """Return this source with its content; raise if that is not a teacher for ``data``."""

    @property
    def parameterization(self) -> str | None:
        return self.facts.parameterization if self.facts else None

    def student_table(self, table: Table, extra: Mapping[str, Any]) -> Table:
        """Return a recipe with the teacher's reference, architecture and conditioning.

        The student keeps its own dropout; overrides of the network are kept too. Only for a source
        that :meth:`found` has returned.
        """
        facts, own = self.facts, table.get("network")
        assert facts is not None
        fixed = {"sigma_data": facts.sigma_data, "conditional": facts.conditional}
        require_unchanged(extra, fixed, facts.who)
        kept = {k: own[k] for k in _OWN if k in own} if isinstance(own, Mapping) else {}
        network = merge({**facts.network, **kept}, extra.get("network", {}))
        followed = {"teacher": self.reference, "network": network, "conditional": facts.conditional}
        if table.get("sigma_data") is None:
            followed["sigma_data"] = facts.sigma_data
        return {**table, **followed}


@dataclass(frozen=True)
class _Imported(_Given):
    """An imported checkpoint: ``import:NAME``, or a path to one."""

    model: ImportedModel | None = field(default=None, compare=False)

    def found(self, context: Context, data: DatasetSpec) -> _Imported:
        model = open_imported(context.workspace, self.reference)
        model.require_parameterization("teacher", {"edm": "a diffusion model"})
        model.require_data(data)
        given = model.facts
        facts = _Facts(
            f"teacher {model.name}",
            given.network,
            given.num_classes > 0,
            given.sigma_data,
            given.parameterization,
        )
        return replace(self, reference=model.title, facts=facts, model=model)

    def open(self, context: Context, student: RunPlan) -> Teacher:
        model = self.model or open_imported(context.workspace, self.reference)
        network = on_device(context, model.build(context))
        reads = self._reads(context, student)
        compiled = context.compile
        return frozen_teacher(self.reference, {"model": network}, reads, student, compiled=compiled)

    def stand_in(self, context: Context, student: RunPlan, build: Builder) -> Teacher:
        model = self.model or open_imported(context.workspace, self.reference)
        network = model.network(context)
        if context.device.type != "cpu":  # fake tensors cannot be moved, not even nowhere
            network.to(context.device)
        return frozen_teacher("random", {"model": network}, self._reads(context, student), student)

    @staticmethod
    def _reads(context: Context, student: RunPlan) -> Callable[[Nets], DiffusionModel]:
        sigma_data = student.data_info(context).sigma_data
        return lambda nets: EDMModel(nets["model"], sigma_data)


@dataclass(frozen=True)
class _FinishedRun(_Given):
    """A finished run: ``run:PATH``, or ``run:ID`` of this workspace; either with ``@HASH``.

    The hash covers the run's method, its resolved recipe and its final weights.
    """

    trained: TrainedRun | None = field(default=None, compare=False)

    def found(self, context: Context, data: DatasetSpec) -> _FinishedRun:
        trained, wanted = self._look_up(context)
        plan, info = trained.plan, trained.plan.data_info(context)
        _require_diffusion_model(context, plan.spec)
        who, order = f"teacher {plan.run_id}", context.dataset_spec(plan.dataset).class_order
        require_same_data(who, info.data_shape, info.num_classes, data, order)
        network, conditional = plan.config.network, plan.config.conditional
        facts = _Facts(who, network, conditional, info.sigma_data, _parameterization(plan))
        _, sha256 = read_manifest(weights_path(trained.folder, MAIN))
        reference = self._require_content(trained, sha256, wanted)
        return replace(self, reference=reference, facts=facts, trained=trained)

    def open(self, context: Context, student: RunPlan) -> Teacher:
        trained = self.trained or self._look_up(context)[0]
        teacher, sha256 = trained_teacher(context, self.reference, trained, student)
        self._require_content(trained, sha256, self.reference.rpartition("@")[2])
        return teacher

    def stand_in(self, context: Context, student: RunPlan, build: Builder) -> Teacher:
        trained = self.trained or self._look_up(context)[0]
        return untrained_teacher(context, trained.plan, student, build)

    def _look_up(self, context: Context) -> tuple[TrainedRun, str]:
        """Return the run, and the digits of its hash that the reference asks for."""
        text, wanted = self.reference.removeprefix(_RUN), ""
        marked = re.fullmatch(rf"(.+)@([0-9a-f]{{{_DIGITS}}})", text)
        if marked and not Path(text).exists():
            text, wanted = marked[1], marked[2]
        folders = dict.fromkeys((expanded(text), context.workspace.run(text)))
        folder = next((f for f in folders if (f / RUN_FILE).is_file()), None)
        if folder is None:
            raise MissingError(
                f"teacher {self.reference}",
                f"there is no {RUN_FILE} in {' or '.join(map(str, folders))}",
                allowed=f"a finished run with the hash {wanted}" if wanted else "a finished run",
                remedy="name its folder with -o teacher=run:FOLDER",
            )
        return saved_run(context, folder), wanted

    def _require_content(self, trained: TrainedRun, weights_sha256: str, wanted: str) -> str:
        """Return the reference to a run's content; raise if its hash is not ``wanted``."""
        saved = read_run_file(trained.folder)
        content = json.dumps([saved["method"], saved["config"], weights_sha256], sort_keys=True)
        digits = hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]
        if wanted and digits != wanted:
            raise UserError(
                f"teacher {self.reference}",
                f"the run in {trained.folder} has the hash {digits}",
                allowed=wanted,
                remedy="name the folder of that run with -o teacher=run:FOLDER, or leave the hash "
                "out to train a student of this run",
            )
        return f"{_RUN}{saved['run']}@{digits}"


def _require_diffusion_model(context: Context, spec: MethodSpec) -> None:
    if not spec.is_teacher:
        able = sorted(n for n, s in context.plugins.methods.specs.items() if s.is_teacher)
        raise UserError(
            "teacher",
            f"method {spec.name!r} does not train a diffusion model",
            allowed=", ".join(able),
            remedy="set teacher=METHOD:RECIPE",
        )


def _parameterization(run: RunPlan) -> str | None:
    """Return the parameterization of a run's network, if its method has that option."""
    return getattr(run.config, "parameterization", None)
