"""Imported checkpoints as runs that are sampled and scored, as teachers, as initialisation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import GOLDEN, write_edm
from patches import PATCHES
from safetensors.torch import load_file
from torch import nn

from cmbench.errors import MissingError, UserError
from cmbench.files import sealed
from cmbench.importers.read import read_checkpoint
from cmbench.leaderboard.verify import _check_config
from cmbench.records.record import Record
from cmbench.samples.source import ReadOptions
from cmbench.sweep import runs
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import count
from cmbench.sweep.executors import Local
from cmbench.sweep.imported import open_imported
from cmbench.sweep.opened_runs import open_run
from cmbench.sweep.planning import plan_imported_run, plan_run
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.runs import build_modules
from cmbench.sweep.sweep import SweepRequest, execute, is_trained, plan_sweep
from cmbench.sweep.training_run import obtain_run, obtain_teacher
from cmbench.sweep.tuning import TuneSettings, tune


def bring(
    context: Context,
    folder: Path,
    name: str = "m",
    golden: str = "edm-ddpmpp-cond",
    class_name: str = "EDMPrecond",
    **attributes: Any,
) -> dict[str, torch.Tensor]:
    """Import a checkpoint in EDM's format; return its state."""
    weights = load_file(GOLDEN / f"{golden}.weights.safetensors")
    path = write_edm(folder / f"{name}.pkl", weights, class_name, **attributes)
    found = read_checkpoint(path)
    found.save(context.workspace.imported / f"{name}.safetensors")
    return dict(found.state)


def sampled(context: Context, **options: Any) -> list[Record]:
    asked = SweepRequest((), "patches", checkpoint="m", **options)
    return execute(context, plan_sweep(context, asked), Local())


# ---- as a run ------------------------------------------------------------------------------------


def test_a_denoiser_is_swept_with_a_named_solver(patches: Context, tmp_path: Path) -> None:
    bring(patches, tmp_path)
    records = sampled(patches, nfes=(3, 4), sampling=SampleSettings(sampler="heun"))
    for record, nfe in zip(records, (3, 4), strict=True):
        assert (record.status, record.kind) == ("finished", "imported checkpoint"), record.reason
        assert (record.method, record.sampling.sampler) == ("edm", "heun")
        assert record.sampling.nfe_measured == nfe
        assert record.metrics["fd-pixels"].value is not None
        assert (record.conditional, record.training.images_seen) == (True, 0)
        told = record.training.config["imported"]
        assert told["source"]["name"] == "m.pkl"
        assert told["sha256"] == record.training.checkpoint_sha256
        assert told["network"]["name"] == "ddpmpp"
        assert record.training.parameters == 189_523
        assert _check_config(record).state == "ok"
    assert not patches.workspace.run(records[0].training.run).exists(), "nothing was trained"
    asked = SweepRequest(
        (), "patches", checkpoint="m", nfes=(3, 4), sampling=SampleSettings(sampler="heun")
    )
    plan = plan_sweep(patches, asked)
    assert plan.done.keys() == {r.cell for r in records}
    assert all(is_trained(patches, run) for run in plan.runs)


def test_noise_levels_are_tuned_for_a_checkpoint(patches: Context, tmp_path: Path) -> None:
    bring(patches, tmp_path)
    run = plan_imported_run(patches, "m", None, "patches", None, 0)
    found = tune(patches, run, 2, TuneSettings(sampler="euler", evaluations=3))
    assert found.evaluations == 4
    assert found.value <= found.start_value
    (record,) = sampled(patches, nfes=(2,), sampling=SampleSettings(sampler="euler"), tuned=True)
    assert record.status == "finished"
    assert record.sampling.sigmas == list(found.sigmas)
    assert record.sampling.tuned is not None


def test_the_images_are_the_official_networks(patches: Context, tmp_path: Path) -> None:
    """One Euler step from sigma_max is the denoiser there: compare with the network itself."""
    state = bring(patches, tmp_path)
    run = plan_imported_run(patches, "m", None, "patches", None, 0)
    method, modules = build_modules(patches, run, None)
    weights = obtain_run(patches, run).weights()
    runs.load_weights(weights, nn.ModuleDict(modules), "raw")
    assert all(torch.equal(modules["model"].state_dict()[n], t) for n, t in state.items())
    plan = method.plan_sampling(1, None, "euler")
    noise, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 7])
    with torch.no_grad():
        made = method.sample(modules, noise, labels, plan, None)  # type: ignore[arg-type]
        x, root = 80.0 * noise.double(), (80.0**2 + 0.25) ** 0.5
        level = torch.full((2,), 80.0).log() / 4
        raw = modules["model"]((x / root).float(), level, labels)
    expected = 0.25 / root**2 * x + 0.5 * 80.0 / root * raw
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_consistency_function_is_sampled_as_one(patches: Context, tmp_path: Path) -> None:
    bring(patches, tmp_path, golden="edm-ddpmpp-uncond", class_name="ECMPrecond", sigma_min=0.003)
    (record,) = sampled(patches, nfes=(2,), overrides=("mid_sigmas=[0.821]",))
    assert record.status == "finished", record.reason
    assert record.sampling.sampler == "multistep"
    assert record.sampling.sigmas == [80.0, 0.821]
    assert record.training.config["sigma_min"] == 0.003, "the checkpoint's boundary"
    assert not record.conditional
    with pytest.raises(
        UserError, match=r"--method: imported checkpoint m has the parameterization"
    ):
        plan_imported_run(patches, "m", "edm", "patches", None, 0)
    named = plan_imported_run(patches, "m", "ect", "patches", None, 0)
    assert (named.spec.name, named.config.model_dump()["sigma_min"]) == ("ect", 0.003)


def test_another_content_is_another_run(patches: Context, tmp_path: Path) -> None:
    bring(patches, tmp_path)
    first = plan_imported_run(patches, "m", None, "patches", None, 0)
    bring(patches, tmp_path, golden="edm-ncsnpp-cond")
    second = plan_imported_run(patches, "m", None, "patches", None, 0)
    assert first.run_id != second.run_id
    with pytest.raises(UserError, match="was replaced after planning"):
        obtain_run(patches, first).weights()


def test_options_come_from_a_named_recipe(patches: Context, tmp_path: Path) -> None:
    bring(patches, tmp_path)
    path = tmp_path / "own.toml"
    path.write_text("[patches.mine]\nbatch_size = 7\n")
    usual, named = (
        plan_imported_run(patches, "m", None, "patches", recipe, 0)
        for recipe in (None, f"{path}:mine")
    )
    assert named.config.batch_size == 7 != usual.config.batch_size
    assert named.config.network == usual.config.network


# ---- as a teacher and as initialisation ----------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("cd", ()),
        ("ect", ()),
        ("sct", ("parameterization=edm",)),
        ("scd", ("parameterization=edm",)),
    ],
)
def test_students_start_from_it(
    patches: Context, tmp_path: Path, recipe: str, method: str, overrides: tuple[str, ...]
) -> None:
    state = bring(patches, tmp_path)
    plan = plan_run(patches, method, "patches", recipe, 0, overrides)
    assert plan.config.teacher == open_imported(patches.workspace, "m").title
    assert plan.config.network["name"] == "ddpmpp", "the architecture is the teacher's"
    assert plan.config.network["dropout"] == 0.1, "the dropout is the student's"
    assert (plan.config.conditional, plan.config.sigma_data) == (True, 0.5)
    teacher = obtain_teacher(patches, plan)
    assert teacher is not None
    _, modules = build_modules(patches, plan, teacher)
    assert all(torch.equal(modules["model"].state_dict()[n], t) for n, t in state.items())
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 20.0]), torch.tensor([0, 9])
    io = load_file(GOLDEN / "edm-ddpmpp-cond.io.safetensors")
    with torch.no_grad():
        assert teacher.model.denoise(x, sigma, labels).shape == x.shape
        found = teacher.model.denoise(io["in.x"], io["in.sigma"], io["in.labels"].argmax(1))
    torch.testing.assert_close(found, io["out.denoised"], rtol=1e-4, atol=1e-5)


def test_what_the_checkpoint_tells_cannot_be_told_otherwise(
    patches: Context, tmp_path: Path, recipe: str
) -> None:
    bring(patches, tmp_path)
    match = r"-o sigma_data=0\.3: .* has (sigma_data )?0\.5; allowed: 0\.5; leave it out"
    with pytest.raises(UserError, match=match):
        plan_imported_run(patches, "m", None, "patches", None, 0, ("sigma_data=0.3",))
    with pytest.raises(UserError, match=match):
        plan_run(patches, "cd", "patches", recipe, 0, ("teacher=import:m", "sigma_data=0.3"))


def test_a_student_of_it_is_costed(patches: Context, tmp_path: Path, recipe: str) -> None:
    bring(patches, tmp_path)
    plan = plan_run(patches, "cd", "patches", recipe, 0, ("teacher=import:m",))
    _, flops, fixed, *_ = count(patches, plan)
    weights = sum(t.numel() for t in open_imported(patches.workspace, "m").load().tensors.values())
    assert fixed >= 4 * weights * 6, "model, target, teacher, gradients and two moments at least"
    assert flops > 0


def test_a_saved_plan_finds_it_again(patches: Context, tmp_path: Path, recipe: str) -> None:
    bring(patches, tmp_path)
    plan = plan_run(patches, "cd", "patches", recipe, 0, ("teacher=import:m",))
    assert plan.teacher is not None
    saved = replace(plan.teacher, model=None, facts=None)  # type: ignore[call-arg]
    first, again = (t.open(patches, plan).network for t in (plan.teacher, saved))
    assert first is not None
    assert again is not None
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert saved.stand_in(patches, plan, build_modules).network is not None


def test_distillation_from_it_ends_as_a_record(
    patches: Context, tmp_path: Path, recipe: str
) -> None:
    bring(patches, tmp_path)
    asked = SweepRequest(("cd",), "patches", recipe, nfes=(1,), overrides=("n_points=3",))
    (record,) = execute(patches, plan_sweep(patches, asked), Local())
    assert (record.status, record.kind) == ("finished", "measured"), record.reason
    model = open_imported(patches.workspace, "m")
    assert record.training.teacher == model.title
    assert record.training.config["teacher"] == model.title
    assert _check_config(record).state == "ok"


def test_the_teachers_content_is_part_of_the_students_identity(
    patches: Context, tmp_path: Path, recipe: str
) -> None:
    bring(patches, tmp_path)
    first = plan_run(patches, "cd", "patches", recipe, 0)
    again = plan_run(patches, "cd", "patches", recipe, 0, (f"teacher={first.config.teacher}",))
    assert again.run_id == first.run_id
    bring(patches, tmp_path, golden="edm-ncsnpp-cond")
    assert plan_run(patches, "cd", "patches", recipe, 0).run_id != first.run_id
    with pytest.raises(UserError, match=r"'m': has the hash \w+; allowed: \w+"):
        plan_run(patches, "cd", "patches", recipe, 0, (f"teacher={first.config.teacher}",))


def test_a_finished_student_is_sampled_without_the_checkpoint(
    patches: Context, tmp_path: Path, recipe: str
) -> None:
    bring(patches, tmp_path)
    asked = SweepRequest(("cd",), "patches", recipe, nfes=(1,), overrides=("n_points=3",))
    (record,) = execute(patches, plan_sweep(patches, asked), Local())
    shutil.rmtree(patches.workspace.imported)
    source = open_run(patches, patches.workspace.run(record.training.run), 1, ReadOptions())
    assert source.trained.plan.run_id == record.training.run
    assert sum(len(b.images) for b in source.source.batches(6)) == 12
    with pytest.raises(MissingError, match=r"imported checkpoint 'm': is not in .*; allowed: none"):
        plan_run(patches, "cd", "patches", recipe, 0)


def test_a_checkpoint_beside_the_workspace_teaches_too(
    patches: Context, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = bring(patches, tmp_path)
    inside = plan_run(patches, "cd", "patches", recipe, 0)
    patches.workspace.imported.rename(tmp_path / "beside")
    plan = plan_run(
        patches, "cd", "patches", recipe, 0, (f"teacher=import:{tmp_path}/beside/m.safetensors",)
    )
    assert plan.run_id == inside.run_id
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda net, **_: compiled.append(net) or net)
    teacher = obtain_teacher(replace(patches, compile=True), plan)
    assert teacher is not None
    assert teacher.network is not None
    assert all(torch.equal(teacher.network.state_dict()[n], t) for n, t in state.items())
    assert teacher.network in compiled


# ---- bad input -----------------------------------------------------------------------------------


def test_what_cannot_be_used_is_one_line(patches: Context, tmp_path: Path, recipe: str) -> None:
    def sample(name: str = "m", method: str | None = None, dataset: str = "patches") -> None:
        plan_imported_run(patches, name, method, dataset, None, 0)

    with pytest.raises(MissingError, match=r"'m': is not in .*run `cmbench import FILE --to m`"):
        sample()
    never = tmp_path / "never-imported.safetensors"
    with pytest.raises(
        MissingError,
        match=r"never-imported\.safetensors': does not exist; .*"
        r"import FILE --to never-imported` first",
    ):
        sample(str(never))
    never.write_bytes(b"")
    with pytest.raises(
        MissingError,
        match=r"has no manifest never-imported\.json beside it: it was "
        r"not imported; .*cmbench import .*never-imported\.safetensors --to NAME",
    ):
        sample(str(never))
    with pytest.raises(MissingError, match="allowed: none yet"):
        plan_run(patches, "cd", "patches", recipe, 0)
    bring(patches, tmp_path)
    with pytest.raises(MissingError, match="allowed: m;"):
        sample("n")
    with pytest.raises(UserError, match=r"name '\.\./m'"):
        sample("../m")
    with pytest.raises(UserError, match=r"makes images of 3x16x16, dataset 'digits' has 1x8x8"):
        sample(dataset="digits")
    with pytest.raises(UserError, match=r"'sct' samples no imported checkpoint; allowed: edm, cd"):
        sample(method="sct")
    with pytest.raises(
        UserError, match="-o conditional=false: teacher m has true; allowed: true; leave it out"
    ):
        plan_run(patches, "cd", "patches", recipe, 0, ("conditional=false",))
    bring(patches, tmp_path, "f", "edm-ddpmpp-uncond", "ECMPrecond", sigma_min=0.003)
    with pytest.raises(UserError, match=r"teacher: imported checkpoint f has the parameterization"):
        plan_run(patches, "cd", "patches", recipe, 0, ("teacher=import:f",))
    patches.plugins.datasets.specs["patches"] = PATCHES._replace(num_classes=4)
    with pytest.raises(UserError, match=r"has 10 classes, dataset 'patches' has 4"):
        sample()


def test_classes_in_another_order_are_refused(
    patches: Context, tmp_path: Path, recipe: str
) -> None:
    specs = patches.plugins.datasets.specs
    assert specs["imagenet64-small"].class_order == "map_clsloc.txt"
    bring(patches, tmp_path)
    bring(patches, tmp_path, "u", "edm-ddpmpp-uncond")
    specs["patches"] = PATCHES._replace(class_order="map_clsloc.txt")
    message = r"m: numbers the classes as in sorted order, dataset 'patches' as in map_clsloc.txt"
    with pytest.raises(UserError, match=message):
        plan_imported_run(patches, "m", None, "patches", None, 0)
    with pytest.raises(UserError, match=message):
        plan_run(patches, "cd", "patches", recipe, 0)
    assert plan_imported_run(patches, "u", None, "patches", None, 0).config.conditional is False


@pytest.mark.parametrize("method", ["sct", "pd"])
def test_a_student_that_reads_the_weights_otherwise_is_refused_at_planning(
    patches: Context, tmp_path: Path, recipe: str, method: str
) -> None:
    bring(patches, tmp_path)
    with pytest.raises(
        UserError,
        match=(
            r"teacher import:m@\w+: its parameterization is 'edm'; allowed: 'trigflow' for this "
            r"student; add -o parameterization=edm"
        ),
    ):
        plan_run(patches, method, "patches", recipe, 0, ("parameterization=trigflow",))
    plan = plan_run(patches, method, "patches", recipe, 0, ("parameterization=edm",))
    assert getattr(plan.config, "parameterization", "") == "edm"


def test_status_names_it(cmbench: Callable[..., Any], patches: Context, tmp_path: Path) -> None:
    bring(patches, tmp_path)
    (patches.workspace.imported / "odd.json").write_text("{")
    done = cmbench("status", "--workspace", str(patches.workspace.root))
    assert done.code == 0, done.err
    assert "imported  m  ddpmpp, 3x16x16, 10 classes, from m.pkl\n" in done.out
    assert "imported  odd  its manifest: is not JSON (" in done.out


def test_another_architecture_is_refused_before_training(
    patches: Context, tmp_path: Path, recipe: str
) -> None:
    bring(patches, tmp_path)
    plan = plan_run(patches, "cd", "patches", recipe, 0, ("network.channels=32",))
    with pytest.raises(UserError, match="its network differs from teacher import:m@"):
        build_modules(patches, plan, obtain_teacher(patches, plan))


def test_a_checkpoint_that_does_not_say_what_it_is(patches: Context, tmp_path: Path) -> None:
    path = tmp_path / "cd.pt"
    torch.save(load_file(GOLDEN / "openai-adm-cond.weights.safetensors"), path)
    found = read_checkpoint(path, channels_per_head=16, resolution=16)
    target = patches.workspace.imported / "m.safetensors"
    found.save(target)
    with pytest.raises(
        UserError, match=r"m has no known parameterization; .*; import it again with --param"
    ):
        plan_imported_run(patches, "m", None, "patches", None, 0)
    found.model_copy(update={"parameterization": "boundary"}).save(target)
    assert plan_imported_run(patches, "m", None, "patches", None, 0).spec.name == "cd"


def test_a_damaged_manifest_is_one_line(patches: Context, tmp_path: Path) -> None:
    bring(patches, tmp_path)
    manifest = patches.workspace.imported / "m.json"
    data = json.loads(manifest.read_text())
    data["meta"]["imported"]["num_classes"] = -1
    edited = json.dumps(data)
    bare = json.dumps({key: data[key] for key in data if key != "seal"})
    for text in ("{", "[]", edited, bare, json.dumps(sealed(data))):
        manifest.write_text(text)
        with pytest.raises(
            UserError,
            match=r"m\..*(is not (a )?JSON|was changed|has no hash|field '\w+': ).*--force",
        ):
            open_imported(patches.workspace, "m")


def test_on_the_command_line(
    cmbench_with_patches: Callable[..., Any], patches: Context, tmp_path: Path
) -> None:
    bring(patches, tmp_path)
    command = ("run", "--checkpoint", "m", "-d", "patches", "--nfe", "1", "--no-report")
    plan = cmbench_with_patches(*command, "--dry-run")
    assert plan.code == 0, plan.err
    assert "189,523" in plan.out
    done = cmbench_with_patches(*command, "--sampler", "euler")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split()[-1] == "finished"
    assert cmbench_with_patches(*command, "-m", ",").code == 2


def test_eval_scores_it_too(
    cmbench_with_patches: Callable[..., Any], patches: Context, tmp_path: Path
) -> None:
    bring(patches, tmp_path)
    command = ("eval", "import:m", "--nfe", "3", "--metrics", "fd-pixels", "--extractor", "pixels")
    done = cmbench_with_patches(*command, "-d", "patches", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["kind"] == "imported checkpoint"
    assert (record["sampling"]["nfe_measured"], record["sampling"]["num_samples"]) == (3, 12)
    assert record["training"]["config"]["imported"]["name"] == "m"
    refused = cmbench_with_patches(*command, "--reference", str(tmp_path))
    assert (refused.code, "has no dataset of its own" in refused.err) == (2, True)
