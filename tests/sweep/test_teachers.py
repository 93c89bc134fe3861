"""Teachers: opened with the right weights, named by content, needed for training only."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cmbench.errors import InterruptedRunError, MissingError, UserError
from cmbench.files import read_sealed, write_sealed
from cmbench.plugin.method import Teacher
from cmbench.records.record import Record
from cmbench.records.reproduction import CannotReproduceError
from cmbench.records.workspace import Workspace
from cmbench.samples.source import ReadOptions
from cmbench.sweep.cell_record import base_record
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import count
from cmbench.sweep.executors import Local
from cmbench.sweep.opened_runs import open_run
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import RunPlan, SampleSettings
from cmbench.sweep.reproducing import find_run
from cmbench.sweep.runs import TrainedRun
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep
from cmbench.sweep.training_run import obtain_run, obtain_teacher
from cmbench.training.checkpoint import load_checkpoint, save_checkpoint

RECIPES = """
[base]
batch_size = 16
duration_kimg = 0.064
network = { name = "mlp", width = 8, blocks = 1 }
ema = [{ halflife_kimg = 0.05 }]

[toys.tiny]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "own.toml"
    path.write_text(RECIPES)
    return f"{path}:tiny"


@pytest.fixture
def elsewhere(toys: Context, recipe: str, tmp_path: Path) -> TrainedRun:
    """A diffusion model that was trained in another workspace."""
    other = replace(toys, workspace=Workspace(tmp_path / "elsewhere"))
    return obtain_run(other, plan_run(toys, "edm", "toys", recipe, 0))


def student(
    context: Context, recipe: str, teacher: object, *more: str, method: str = "cd"
) -> RunPlan:
    return plan_run(context, method, "toys", recipe, 0, (f"teacher={teacher}", *more))


def changed(folder: Path) -> None:
    """Change one number of a run's weights and its result, as another training would."""
    path = folder / "weights-final.safetensors"
    found = load_checkpoint(path)
    tensors = {k: v + (i == 0) for i, (k, v) in enumerate(sorted(found.tensors.items()))}
    sha256 = save_checkpoint(path, tensors, found.meta)
    result = read_sealed(folder / "result.json")
    result["exports"]["final"]["sha256"] = sha256
    write_sealed(folder / "result.json", result)


def content(teacher: Teacher | None) -> dict[str, torch.Tensor]:
    assert teacher is not None
    assert teacher.network is not None
    return dict(teacher.network.state_dict())


def test_a_teacher_without_a_recipe_has_its_methods_default(context: Context) -> None:
    plans = [
        plan_run(context, "cd", "digits", "smoke", 0, (f"teacher={name}",)).teacher
        for name in ("edm", "edm:", "edm:demo")
    ]
    runs = [teacher.run for teacher in plans if teacher is not None]
    assert [run.recipe for run in runs if run is not None] == ["demo"] * 3


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["recipe", "run"])
def test_a_teacher_has_its_averaged_weights(
    toys: Context, recipe: str, elsewhere: TrainedRun, kind: str
) -> None:
    plan = student(toys, recipe, f"edm:{recipe}" if kind == "recipe" else f"run:{elsewhere.folder}")
    found = content(obtain_teacher(toys, plan))
    tensors = elsewhere.weights().tensors  # the same recipe and seed: the same training
    averaged = {k: tensors[f"halflife-0.05kimg/model.{k}"] for k in found}
    raw = {k: tensors[f"raw/model.{k}"] for k in found}
    assert all(torch.equal(found[k], v) for k, v in averaged.items())
    assert not all(torch.equal(found[k], v) for k, v in raw.items())


def test_a_teacher_without_averages_has_its_weights(toys: Context, recipe: str) -> None:
    trained = obtain_run(toys, plan_run(toys, "edm", "toys", recipe, 0, ("ema=[]",)))
    found = content(obtain_teacher(toys, student(toys, recipe, f"run:{trained.folder}")))
    tensors = trained.weights().tensors
    assert all(torch.equal(v, tensors[f"raw/model.{k}"]) for k, v in found.items())


@pytest.mark.parametrize("kind", ["recipe", "run"])
def test_a_teacher_is_frozen_and_compiled_if_the_run_is(
    toys: Context, recipe: str, elsewhere: TrainedRun, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = student(toys, recipe, f"edm:{recipe}" if kind == "recipe" else f"run:{elsewhere.folder}")
    assert content(obtain_teacher(toys, plan))  # trained by now
    compiled: list[Any] = []

    def record(module: Any, **options: Any) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", record)
    for wanted in (False, True):
        compiled.clear()
        teacher = obtain_teacher(replace(toys, compile=wanted), plan)
        assert teacher is not None
        assert isinstance(teacher.network, nn.Module)
        assert (teacher.network in compiled) is wanted
        assert not teacher.network.training
        assert not any(p.requires_grad for p in teacher.network.parameters())


def test_a_stage_of_a_staged_method_has_its_own_number_of_images(
    toys: Context, recipe: str
) -> None:
    options = (f"teacher=edm:{recipe}", "start_steps=4", "parameterization=edm")
    request = SweepRequest(("pd",), "toys", recipe, nfes=(2, 1), overrides=options)
    first, last = execute(toys, plan_sweep(toys, request), Local())
    assert (first.status, last.status) == ("finished", "finished"), (first.reason, last.reason)
    assert (first.training.images_seen, last.training.images_seen) == (64, 128)
    evaluations = first.training.network_evaluations, last.training.network_evaluations
    assert 0 < evaluations[0] < evaluations[1]
    assert set(first.training.seconds_by_phase) == {"steps-2"}
    assert set(last.training.seconds_by_phase) == {"steps-2", "steps-1"}
    assert first.training.checkpoint_sha256 != last.training.checkpoint_sha256


# ---- identities ----------------------------------------------------------------------------------


def test_a_run_is_named_by_its_content_and_not_by_its_place(
    toys: Context, recipe: str, elsewhere: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = elsewhere.folder
    plan = student(toys, recipe, f"run:{folder}")
    named = plan.config.teacher
    assert named is not None
    assert named.startswith(f"run:{elsewhere.plan.run_id}@")
    assert str(folder) not in json.dumps(plan.table)
    monkeypatch.chdir(folder.parent)
    copied = folder.with_name("copied")
    shutil.copytree(folder, copied)
    for place in (f"./{folder.name}", folder.name, f"{folder}/", copied, f"{folder}@{named[-16:]}"):
        again = student(toys, recipe, f"run:{place}")
        assert (again.run_id, again.config.teacher) == (plan.run_id, named), place


def test_a_failed_cell_names_its_teacher_too(
    toys: Context, recipe: str, elsewhere: TrainedRun
) -> None:
    plan = student(toys, recipe, f"run:{elsewhere.folder}")
    (cell,) = plan_cells(toys, plan, (1,), 0, SampleSettings())
    failed = base_record(toys, cell, "failed", None, "why")
    assert failed.training.teacher == plan.config.teacher


def test_a_run_of_the_workspace_is_named_by_its_id(toys: Context, recipe: str) -> None:
    trained = obtain_run(toys, plan_run(toys, "edm", "toys", recipe, 0))
    by_path = student(toys, recipe, f"run:{trained.folder}")
    for name in (f"run:{trained.plan.run_id}", by_path.config.teacher):
        assert student(toys, recipe, name).run_id == by_path.run_id


def test_another_content_in_the_same_place_is_another_run(
    toys: Context, recipe: str, elsewhere: TrainedRun
) -> None:
    before = student(toys, recipe, f"run:{elsewhere.folder}")
    trained = obtain_run(toys, before)
    changed(elsewhere.folder)
    after = student(toys, recipe, f"run:{elsewhere.folder}")
    assert after.run_id != before.run_id
    assert obtain_run(toys, after).folder != trained.folder
    place = replace(toys, workspace=Workspace(elsewhere.folder.parents[2]))
    other = obtain_run(place, plan_run(toys, "edm", "toys", recipe, 0, ("p_mean=-1.0",)))
    last = student(toys, recipe, f"run:{other.folder}")
    assert len({before.run_id, after.run_id, last.run_id}) == 3


def test_a_student_takes_the_networks_shape_and_keeps_its_dropout(
    toys: Context, recipe: str, tmp_path: Path
) -> None:
    options = ("network.width=16", "network.dropout=0.3", "conditional=true", "sigma_data=0.4")
    trained = obtain_run(toys, plan_run(toys, "edm", "toys", recipe, 0, options))
    plan = student(toys, recipe, f"run:{trained.folder}")
    assert (plan.config.network["width"], plan.config.network["dropout"]) == (16, 0.3)
    assert (plan.config.conditional, plan.config.sigma_data) == (True, 0.4)
    path = tmp_path / "dropped.toml"
    path.write_text(RECIPES.replace("blocks = 1", "blocks = 1, dropout = 0.1"))
    plan = student(toys, f"{path}:tiny", f"run:{trained.folder}")
    assert (plan.config.network["width"], plan.config.network["dropout"]) == (16, 0.1)
    with pytest.raises(
        UserError, match=r"-o sigma_data=0\.5: teacher toys/edm.* has 0\.4; allowed"
    ):
        student(toys, recipe, f"run:{trained.folder}", "sigma_data=0.5")
    obtain_run(toys, plan)


# ---- the teacher is not where it was -------------------------------------------------------------


def test_a_finished_student_is_sampled_without_its_teacher_and_its_recipe(
    toys: Context, recipe: str, elsewhere: TrainedRun
) -> None:
    options = (f"teacher=run:{elsewhere.folder}", "n_points=3")
    request = SweepRequest(("cd",), "toys", recipe, nfes=(1,), overrides=options)
    (record,) = execute(toys, plan_sweep(toys, request), Local())
    assert isinstance(record, Record)
    assert record.training.teacher == record.training.config["teacher"]
    shutil.rmtree(elsewhere.folder)
    Path(recipe.removesuffix(":tiny")).unlink()
    folder = toys.workspace.run(record.training.run)
    source = open_run(toys, folder, 1, ReadOptions())
    assert source.trained.plan.run_id == record.training.run
    assert sum(len(b.images) for b in source.source.batches(64)) == 64
    assert find_run(toys, record).folder == folder
    other = record.training.model_copy(update={"config_sha256": "0" * 64})
    with pytest.raises(CannotReproduceError, match="reads the record's configuration differently"):
        find_run(toys, record.model_copy(update={"training": other}))


def stopped(context: Context, plan: RunPlan) -> None:
    asked = iter([None, "stopped"])
    with pytest.raises(InterruptedRunError):
        obtain_run(replace(context, should_stop=lambda: next(asked, "stopped")), plan)


def test_a_student_resumes_where_its_teacher_is_found_again(
    toys: Context, recipe: str, elsewhere: TrainedRun, tmp_path: Path
) -> None:
    whole = replace(toys, workspace=Workspace(tmp_path / "whole"))
    reference = obtain_run(whole, student(whole, recipe, f"run:{elsewhere.folder}")).weights()
    plan = student(toys, recipe, f"run:{elsewhere.folder}")
    stopped(toys, plan)
    saved = json.loads((toys.workspace.run(plan.run_id) / "run.json").read_text())
    named = saved["config"]["teacher"]
    with pytest.raises(
        MissingError, match=rf"there is no run\.json in .*with the hash {named[-16:]}"
    ):
        student(toys, recipe, named)
    shutil.copytree(elsewhere.folder, toys.workspace.run(elsewhere.plan.run_id))
    again = plan_run(toys, "cd", "toys", recipe, 0, saved["config"])
    assert again.run_id == plan.run_id
    assert obtain_run(toys, again).weights().sha256 == reference.sha256


def test_a_teacher_with_another_content_is_refused_by_its_hash(
    toys: Context, recipe: str, elsewhere: TrainedRun
) -> None:
    plan = student(toys, recipe, f"run:{elsewhere.folder}")
    named = plan.config.teacher
    assert named is not None
    changed(elsewhere.folder)
    with pytest.raises(UserError, match=r"other files describe: sha256 \w+; allowed: \w+; restore"):
        obtain_teacher(toys, plan)
    with pytest.raises(UserError, match=rf"has the hash \w+; allowed: {named[-16:]}; "):
        student(toys, recipe, f"run:{elsewhere.folder}@{named[-16:]}")


# ---- what cannot teach ---------------------------------------------------------------------------


def test_runs_that_cannot_teach_are_one_line(
    toys: Context, recipe: str, elsewhere: TrainedRun, tmp_path: Path
) -> None:
    toy = obtain_run(toys, plan_run(toys, "toy", "toys", "demo", 0))
    with pytest.raises(UserError, match="teacher: method 'toy' does not train a diffusion model"):
        student(toys, recipe, f"run:{toy.folder}")
    (elsewhere.folder / "result.json").unlink()
    with pytest.raises(MissingError, match=rf"run {elsewhere.folder}: is not finished"):
        student(toys, recipe, f"run:{elsewhere.folder}")
    (elsewhere.folder / "run.json").write_text("{}")
    with pytest.raises(MissingError, match=r"run\.json: has no hash of its contents"):
        student(toys, recipe, f"run:{elsewhere.folder}")
    with pytest.raises(
        MissingError, match="allowed: a finished run; name its folder with -o teach"
    ):
        student(toys, recipe, f"run:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("kind", ["recipe", "run"])
def test_weights_that_would_be_misread_are_refused_before_any_training(
    toys: Context, recipe: str, elsewhere: TrainedRun, kind: str
) -> None:
    teacher = f"edm:{recipe}" if kind == "recipe" else f"run:{elsewhere.folder}"
    line = r"teacher .*: its parameterization is 'edm'; allowed: 'trigflow' for this student; add"
    with pytest.raises(UserError, match=line):
        student(toys, recipe, teacher, method="sct")
    plan = student(toys, recipe, teacher, "parameterization=edm", method="sct")
    assert not toys.workspace.run(plan.run_id).exists()


def test_a_student_of_a_run_is_costed(toys: Context, recipe: str, elsewhere: TrainedRun) -> None:
    plan = student(toys, recipe, f"run:{elsewhere.folder}")
    same = student(toys, recipe, f"edm:{recipe}")
    assert count(toys, plan) == count(toys, same)
    assert count(toys, plan)[1] > 0
