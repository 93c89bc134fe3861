"""Studies: comparisons of named arms that anybody can repeat, each a TOML file.

An arm is a method with a recipe and options on the study's dataset; a ``sweep`` makes one arm of
every value of an option. Arms are ordinary runs and cells: what is measured is never run again.

    title = "…"
    claim = "what the study puts to the test"
    source = "where the claim is made"
    dataset = "gmm"
    seeds = 2                    # training seeds 0 and 1
    nfe = [1]
    options = { duration_kimg = 300 }

    [[arms]]
    name = "discrete"
    method = "…"
    options = { … }              # added to the study's
    sweep = { option = "n_points", values = [5, 9, 18] }

    [[plots]]
    kind = "metric"              # a metric against the swept option, or by arm
    metric = "flow-map-mean"     # the one that leaderboards rank by, if not given

    [[plots]]
    kind = "curve"               # what training logged, against images seen
    scalar = "tangent_norm"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cmbench.errors import UserError
from cmbench.files import read_toml, reading
from cmbench.plugin.config import Options
from cmbench.plugin.manager import PluginManager
from cmbench.records.studies import Arm, ArmResult, Plot, StudyResult
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Executor
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.recipes import merge
from cmbench.sweep.sweep import SweepPlan, SweepRequest, execute, plan_sweep
from cmbench.sweep.validation import validate

#: More arms than a plot can show.
MAX_ARMS = 40


class SweepTable(Options):
    """One arm for every value of an option."""

    option: str = Field(min_length=1, description="the option's key, for example optimizer.lr")
    values: tuple[float | int | str | bool, ...] = Field(min_length=1, description="its values")


class ArmTable(Options):
    """One line of the comparison."""

    name: str = Field(min_length=1, description="what tables and legends call it")
    method: str = Field(description="as in `cmbench list methods`")
    recipe: str | None = Field(None, description="the method's default recipe if not given")
    options: dict[str, Any] = Field(default_factory=dict, description="hyper-parameters")
    sweep: SweepTable | None = Field(None, description="makes several arms of this one")


class PlotTable(Options):
    """One picture."""

    kind: Literal["metric", "curve"] = Field(description="a measured number, or a training log's")
    metric: str | None = Field(None, description="the dataset's ranking metric if not given")
    scalar: str = Field("loss", description="column of the training log")
    scale: Literal["linear", "log"] = Field("log", description="of the vertical axis")


class StudyTable(Options):
    """A study's file."""

    title: str = Field(description="one line")
    claim: str = Field(description="what is put to the test")
    source: str = Field("", description="where the claim is made")
    dataset: str = Field(description="as in `cmbench list datasets`")
    seeds: int = Field(2, ge=1, le=100, description="training seeds, from 0")
    nfe: tuple[int, ...] | None = Field(None, description="the dataset's sweep if not given")
    samples: int | None = Field(None, ge=2, description="images per cell; default: the protocol's")
    options: dict[str, Any] = Field(default_factory=dict, description="of all arms")
    arms: tuple[ArmTable, ...] = Field(min_length=1, description="what is compared")
    plots: tuple[PlotTable, ...] = Field((PlotTable(kind="metric"),), description="the pictures")


@dataclass(frozen=True)
class Study:
    """A study that has been read and checked."""

    name: str
    table: StudyTable
    arms: tuple[Arm, ...]
    #: what `cmbench study` takes to read it again: its name, or the file
    argument: str


# ---- reading ------------------------------------------------------------------------------------


def load_study(plugins: PluginManager, name: str) -> Study:
    """Return the study of that name, or the one that a file ``NAME.toml`` of yours describes.

    Raises:
        UserError: there is none of that name, or its file is wrong.
    """
    if name.endswith(".toml"):
        return replace(read_study(Path(name).stem, Path(name)), argument=Path(name).name)
    return read_study(name, plugins.studies.get(name, "cmbench study").file)


def read_study(name: str, path: Path) -> Study:
    """Read a study's file; raise ``UserError`` naming the file and the key otherwise."""
    who, remedy = f"study file {path}", "correct the file"
    with reading(who, remedy):
        table = validate(StudyTable, read_toml(path), who, remedy=remedy)
    arms = tuple(arm for entry in table.arms for arm in expand(table, entry))
    names = [arm.name for arm in arms]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(who, f"two arms are called {twice!r}", remedy="name them apart")
    if len(arms) > MAX_ARMS:
        raise UserError(who, f"has {len(arms)} arms", allowed=f"at most {MAX_ARMS}")
    return Study(name, table, arms, name)


def expand(table: StudyTable, entry: ArmTable) -> Iterator[Arm]:
    """Yield the arms of an entry: one, or one for every value it sweeps."""
    options = merge(table.options, entry.options)
    if entry.sweep is None:
        yield Arm(entry.name, entry.name, entry.method, entry.recipe, options)
        return
    for value in entry.sweep.values:
        inner: Any = value
        for part in reversed(entry.sweep.option.split(".")):
            inner = {part: inner}
        number = isinstance(value, int | float) and not isinstance(value, bool)
        yield Arm(
            f"{entry.name}, {entry.sweep.option} = {value}",
            entry.name,
            entry.method,
            entry.recipe,
            merge(options, inner),
            entry.sweep.option,
            float(value) if number else None,
        )


# ---- running ------------------------------------------------------------------------------------


def plan_study(context: Context, study: Study) -> list[tuple[Arm, SweepPlan]]:
    """Resolve every arm before any work starts; an error names the study and the arm."""
    table = study.table
    spec = context.dataset_spec(table.dataset, f"study {study.name!r}")
    known = set(context.plugins.metrics.specs) | set(spec.metrics)
    for plot in table.plots:
        if plot.kind == "metric" and plot.metric is not None and plot.metric not in spec.metrics:
            where = "measured on" if plot.metric in known else "known to"
            raise UserError(
                f"study {study.name!r}",
                f"plots metric {plot.metric!r}, which is not {where} {spec.name!r}",
                allowed=", ".join(spec.metrics),
                remedy="correct the study's file",
            )
    planned = []
    for arm in study.arms:
        request = SweepRequest(
            (arm.method,),
            table.dataset,
            arm.recipe,
            table.nfe,
            range(table.seeds),
            arm.options,
            SampleSettings(num_samples=table.samples),
        )
        try:
            plan = plan_sweep(context, request)
            if len(plan.jobs) != table.seeds:
                raise UserError(
                    "options", "several values of an option", allowed="one value in each arm"
                )
            planned.append((arm, plan))
        except UserError as error:
            raise type(error)(
                f"study {study.name!r}, arm {arm.name!r}: {error.who}",
                error.problem,
                allowed=error.allowed,
                remedy=error.remedy,
            ) from error
    return planned


def run_study(
    context: Context, study: Study, planned: Sequence[tuple[Arm, SweepPlan]], executor: Executor
) -> StudyResult:
    """Measure what is not measured yet; a cell that fails is a record and the study goes on."""
    table = study.table
    spec = context.dataset_spec(table.dataset)
    plots = tuple(
        Plot(p.kind, p.scalar if p.kind == "curve" else p.metric or spec.metrics[0], p.scale)
        for p in table.plots
    )
    return StudyResult(
        study.name,
        table.title,
        table.claim,
        table.source,
        table.dataset,
        table.seeds,
        study.argument,
        spec.metrics[0],
        plots,
        [ArmResult(arm, tuple(execute(context, plan, executor))) for arm, plan in planned],
        context.workspace.records(spec.name),
    )
