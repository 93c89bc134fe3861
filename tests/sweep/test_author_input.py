"""Wrong input of plugins' authors: refused by name, before any work where that can be known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from toy import TOYS

from cmbench.cli.report import charts_problem, columns_problem, hook_columns
from cmbench.data.base import load_dataset
from cmbench.data.stored import ArrayDataset
from cmbench.errors import PluginError, UserError
from cmbench.plugin import hookimpl
from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import ExecutorSpec
from cmbench.report.cells import path_problem
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Job, open_executor
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep

Work = Callable[[Job], None]


class Dropping:
    """Carries out the first job only."""

    def run(self, jobs: Iterable[Job], work: Work) -> None:
        work(next(iter(jobs)))


class Inventing:
    """Halves the first job."""

    def run(self, jobs: Iterable[Job], work: Work) -> None:
        for job in jobs:
            work(job[:1])


class Nothing:
    """No executor."""


def broken() -> None:
    raise OSError("no cluster")


@pytest.mark.parametrize(("executor", "missing"), [(Dropping, 2), (Inventing, 2)])
def test_an_executor_that_drops_cells_is_named(
    toys: Context, executor: type[Any], missing: int
) -> None:
    plan = plan_sweep(toys, SweepRequest(("toy",), "toys", "demo", (1, 2), (0, 1)))
    with pytest.raises(PluginError) as raised:
        execute(toys, plan, executor())
    assert str(raised.value).startswith(
        f"executor {executor.__name__}: {missing} of 4 cells were not worked on, 0 others were; "
        "allowed: one call of work for every job"
    )
    kept = list(toys.workspace.records("toys").glob("*.json"))
    assert len(kept) == 4 - missing, "what was done has its record"


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("test_author_input:Nothing", r"its factory returned Nothing; allowed: an object with run"),
        ("test_author_input:broken", "cannot be made: OSError: no cluster"),
    ],
)
def test_an_executor_that_is_none_is_refused_before_any_work(factory: str, problem: str) -> None:
    manager = PluginManager()
    manager.executors.add(ExecutorSpec("own", factory, "Own"), PluginInfo("p", "p", "d", "1"))
    with pytest.raises(PluginError, match=f"executor 'own': {problem}"):
        open_executor(manager, "own")


def test_labels_that_contradict_the_spec_are_refused() -> None:
    def build(spec: Any, locations: Any) -> ArrayDataset:
        pixels = np.zeros((6, 1, 2, 2), np.uint8)
        labels = np.arange(6)
        return ArrayDataset(spec, pixels, labels, sha256="0" * 64, revision="1")

    assert load_dataset(TOYS._replace(num_classes=6), build).class_counts == (1,) * 6
    with pytest.raises(UserError) as raised:
        load_dataset(TOYS, build)
    assert str(raised.value) == (
        "dataset 'toys': its labels are of 6 classes, its spec says 3; allowed: labels from 0 to 2;"
        " fix num_classes in the plugin that registers it, or its labels"
    )


# ---- columns and charts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "method",
        "metrics.fid.value",
        "metrics.my-metric.detail.anything.below",
        "training.config.optimizer.lr",
        "training.overrides.lr",
        "sampling.tuned.metric",
        "first_samples.count",
        "dataset.name",
        "artifacts.grid.file",
        "copies.pixels.copies",
        "environment.packages.torch",
    ],
)
def test_paths_into_a_record(path: str) -> None:
    assert path_problem(path) == ""


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("metric.fid.value", "metric"),
        ("metrics.fid.valeu", "valeu"),
        ("training.lr", "lr"),
        ("dataset.name.length", "length"),
        ("", ""),
        ("sampling.sigmas.0", "0"),
    ],
)
def test_paths_that_name_nothing(path: str, part: str) -> None:
    found = path_problem(path)
    assert found.startswith(f"the path {path!r}, in which {part!r} does not exist; allowed there: ")


class Columns:
    """Columns of somebody's plugin."""

    def __init__(self, columns: Any) -> None:
        self.columns = columns

    @hookimpl
    def cmbench_report_columns(self) -> Any:
        return self.columns


def test_a_plugin_with_a_wrong_column_is_named_and_the_others_stay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    manager = PluginManager()
    for name, columns in [("bad", {"A": "metrics.fid.valeu"}), ("good", {"B": "method"})]:
        manager.register(Columns(columns), PluginInfo(name, "m", "dist", "1"))
    assert hook_columns(manager) == {"B": "method"}
    assert capsys.readouterr().err.startswith(
        "warning: plugin 'bad' (dist 1): cmbench_report_columns returned the path "
        "'metrics.fid.valeu', in which 'valeu' does not exist; allowed there: detail, "
    )


@pytest.mark.parametrize(("found", "said"), [(None, "NoneType"), ([1], "list"), ("x", "str")])
def test_columns_and_charts_of_another_kind(found: Any, said: str) -> None:
    assert columns_problem(found) == (
        f"returned {said}; allowed: titles to dotted paths into a record"
    )
    assert charts_problem(found) == (
        f"returned {said}; allowed: a list of mappings with title and svg"
    )
    assert "the path 3" in columns_problem({"A": 3})
    assert charts_problem([{"title": "t"}]) == ""
