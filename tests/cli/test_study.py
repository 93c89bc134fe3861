"""``cmbench study``: files, arms, resuming, pages, plots, and what bad input says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench.errors import UserError
from cmbench.plugin import hookimpl
from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import StudySpec
from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace
from cmbench.report import study_plot
from cmbench.report.study import mean_text, summary
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.run_files import read_log
from cmbench.sweep.studies import load_study, plan_study, read_study, run_study

Command = Callable[..., Any]

STUDY = """
title = "Two | levels"
claim = "More noise is worse."
dataset = "toys"
seeds = 2
nfe = [1]
samples = 32
options = { duration_kimg = 0.096 }

[[arms]]
name = "swept"
method = "toy"
sweep = { option = "sigma", values = [0.5, 2.0] }

[[arms]]
name = "classes"
method = "toy"
recipe = "classes"
options = { duration_kimg = 0.064 }

[[plots]]
kind = "metric"

[[plots]]
kind = "curve"
scalar = "twice_loss"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "levels.toml"
    path.write_text(STUDY)
    return path


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_study("bad", path)
    return str(caught.value)


# ---- files --------------------------------------------------------------------------------------


def test_arms_are_expanded_and_options_merged(file: Path) -> None:
    arms = read_study("levels", file).arms
    assert [(a.name, a.series, a.x) for a in arms] == [
        ("swept, sigma = 0.5", "swept", 0.5),
        ("swept, sigma = 2.0", "swept", 2.0),
        ("classes", "classes", None),
    ]
    assert arms[0].options == {"duration_kimg": 0.096, "sigma": 0.5}
    assert arms[2].options == {"duration_kimg": 0.064}


def test_two_training_seeds_are_the_default(file: Path) -> None:
    file.write_text(STUDY.replace("seeds = 2\n", ""))
    assert read_study("levels", file).table.seeds == 2


def test_every_builtin_study_can_be_planned(context: Context) -> None:
    assert len(context.plugins.studies.specs) >= 8
    for name, spec in context.plugins.studies.specs.items():
        study = load_study(context.plugins, name)
        assert study.table.title == spec.title
        planned = plan_study(context, study)
        hashes = [plan.jobs[0][0].run.config_sha256 for _, plan in planned]
        assert len(set(hashes)) == len(hashes) >= 2, f"{name}: two arms are the same run"
        assert all(cell.sampling is not None for _, plan in planned for cell in plan.cells)


def test_the_study_of_the_example_plugin_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "examples/cmbench-example-plugin/cmbench_example"
    study = read_study("example-steps", folder / "steps.toml")
    assert [(arm.method, arm.x) for arm in study.arms] == [
        ("example-flow", 128.0),
        ("example-flow", 512.0),
    ]


def test_a_plugin_brings_its_own_study(plugins: PluginManager, file: Path) -> None:
    class Plugin:
        @hookimpl
        def cmbench_register_studies(self) -> list[StudySpec]:
            return [StudySpec("mine", "My study", file)]

    assert plugins.register(Plugin(), PluginInfo("mine", "mine", "dist", "1")).status == "ok"
    assert load_study(plugins, "mine").table.dataset == "toys"


def test_a_spec_without_a_path_is_refused(plugins: PluginManager) -> None:
    class Plugin:
        @hookimpl
        def cmbench_register_studies(self) -> list[StudySpec]:
            return [StudySpec("mine", "My study", "levels.toml")]  # type: ignore[arg-type]

    info = plugins.register(Plugin(), PluginInfo("mine", "mine", "dist", "1"))
    assert "file 'levels.toml' (allowed: a pathlib.Path)" in info.error
    assert "mine" not in plugins.studies.specs


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds = 2", "seeds = 0", "seeds: Input should be greater than or equal to 1, got 0"),
        ('claim = "More noise is worse."', "", "claim: Field required"),
        ("samples = 32", "sample = 32", "sample: unknown key"),
        (
            'name = "classes"',
            'name = "swept, sigma = 0.5"',
            "two arms are called 'swept, sigma = 0.5'",
        ),
        ("values = [0.5, 2.0]", "values = []", "values"),
        ('kind = "metric"', 'kind = "pie"', "plots.0.kind"),
        ("seeds = 2", "seeds = ", "is not valid TOML"),
        ("[0.5, 2.0]", str(list(range(50))), "has 51 arms; allowed: at most 40"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in STUDY
    message = refused(tmp_path, STUDY.replace(old, new))
    assert message.startswith(f"study file {tmp_path / 'bad.toml'}: ")
    assert says in message
    assert "\n" not in message


# ---- running ------------------------------------------------------------------------------------


def test_a_study_leaves_a_page_and_is_not_run_again(
    cmbench_with_toys: Command, file: Path, workspace: Workspace
) -> None:
    pytest.importorskip("matplotlib")
    done = cmbench_with_toys("study", str(file), "-q")
    assert done.code == 0
    assert all(line.startswith("warning: ") for line in done.err.splitlines()), done.err
    folder = workspace.root / "studies"
    assert {p.name for p in folder.iterdir()} == {
        "levels.md",
        "levels-1.svg",
        "levels-1.png",
        "levels-2.svg",
        "levels-2.png",
    }
    page = (folder / "levels.md").read_text()
    assert page.startswith("# Two \\| levels\n")
    assert "To repeat: `cmbench study levels.toml`." in page
    records = sorted(workspace.records("toys").glob("*.json"))
    assert len(records) == 6
    for path in records:
        record = read_record(path)
        value = record.metrics["fd-pixels"].value
        assert value is not None
        assert record.sampling.num_samples == 32
    assert page.count("| `toy` | 1 | ") == 3
    svg = (folder / "levels-1.svg").read_text()
    assert ">swept<" in svg
    assert ">sigma<" in svg
    assert ">twice_loss<" in (folder / "levels-2.svg").read_text()

    before = {p: p.read_bytes() for p in records}
    records[0].unlink()
    again = cmbench_with_toys("study", str(file))
    assert again.code == 0
    assert again.err.count("sample ") == 1
    assert "train " not in again.err
    assert {p: p.read_bytes() for p in records[1:]} == {p: before[p] for p in records[1:]}
    assert (folder / "levels.md").read_text() == page


def test_values_and_curves_are_those_of_records_and_logs(toys: Context, file: Path) -> None:
    study = read_study("levels", file)
    result = run_study(toys, study, plan_study(toys, study), Local())
    text = summary(result, ["a.svg", "b.svg"])
    assert [p.quantity for p in result.plots] == ["fd-pixels", "twice_loss"]
    first = result.arms[0]
    values = [r.metrics["fd-pixels"].value for r in first.records]
    assert [r.training.seed for r in first.records] == [0, 1]
    assert f"| swept, sigma = 0.5 | `toy` | 1 | {mean_text([v for v in values if v])} |" in text
    curves = result.curves(first, "twice_loss")
    assert len(curves) == 2
    run = toys.workspace.run(first.records[0].training.run)
    assert curves[0] == [(row["nimg"], row["twice_loss"]) for row in read_log(run)]
    assert result.curves(first, "nothing") == []
    assert "![twice_loss](b.svg)" in text


def test_a_failing_arm_is_told_and_the_others_are_measured(
    cmbench_with_toys: Command, file: Path, workspace: Workspace
) -> None:
    file.write_text(STUDY.replace("duration_kimg = 0.064", 'trouble = "nan-images"'))
    done = cmbench_with_toys("study", str(file), "-q", "--no-plot")
    assert done.code == 1
    assert "NaN" in done.err
    page = (workspace.root / "studies" / "levels.md").read_text()
    assert "## Not measured" in page
    assert re.search(r"- classes, seed 0, NFE 1: failed: .*NaN", page)
    assert "| classes | `toy` | 1 | – |" in page
    assert "| classes | 0 | – |" in page


def test_mean_and_spread_never_the_minimum() -> None:
    assert mean_text([]) == "–"
    assert mean_text([2.0]) == "2.00"
    assert mean_text([1.0, 3.0]) == "2.00 ± 1.4"


# ---- bad input ----------------------------------------------------------------------------------


def failure(cmbench: Command, *arguments: str) -> str:
    done = cmbench("study", *arguments)
    assert done.code in (2, 4)
    assert done.out == ""
    assert done.err.count("\n") == 1
    return str(done.err)


def test_an_unknown_study_is_refused(cmbench: Command) -> None:
    assert "unknown study 'curriculm'" in (said := failure(cmbench, "curriculm"))
    assert "did you mean 'curriculum'?" in said
    assert "no study is named" in failure(cmbench)
    assert "cannot be read" in failure(cmbench, "no-such.toml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('recipe = "classes"', 'recipe = "clases"', "did you mean 'classes'?"),
        (
            'method = "toy"\nrecipe',
            'method = "ty"\nrecipe',
            "arm 'classes': cmbench study: unknown",
        ),
        ("duration_kimg = 0.064", "duration = 1", "did you mean 'duration_kimg'?"),
        ('dataset = "toys"', 'dataset = "toy"', "unknown dataset 'toy'"),
        ('kind = "metric"', 'kind = "metric"\nmetric = "fid"', "not measured on 'toys'"),
    ],
)
def test_bad_arms_are_named_before_any_work(
    cmbench_with_toys: Command, file: Path, workspace: Workspace, old: str, new: str, says: str
) -> None:
    assert old in STUDY
    file.write_text(STUDY.replace(old, new))
    said = failure(cmbench_with_toys, str(file), "--no-plot")
    assert said.startswith("error: study 'levels'")
    assert says in said
    assert not (workspace.root / "runs").exists()


def test_without_matplotlib_nothing_is_started(
    cmbench_with_toys: Command, file: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_plot, "find_spec", lambda name: None)
    said = failure(cmbench_with_toys, str(file))
    assert "matplotlib is not installed" in said
    assert "pip install 'cmbench[plots]'" in said
    assert not workspace.root.exists()
    assert cmbench_with_toys("study", str(file), "--no-plot", "-q").code == 0


def test_studies_are_listed(cmbench: Command) -> None:
    done = cmbench("study", "--list")
    assert "curriculum" in done.out
    rows = json.loads(cmbench("list", "studies", "--json").out)
    assert {"curriculum", "target-ema"} <= {row["name"] for row in rows}
