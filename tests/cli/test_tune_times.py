"""``cmbench tune-times`` and ``cmbench run --sigmas tuned``, end to end on ``gmm``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cmbench.cli.tune_times import TuneOptions
from cmbench.diffusion.grids import sampling_karras_sigmas
from cmbench.errors import UserError
from cmbench.files import read_sealed, write_sealed
from cmbench.plugin.manager import PluginManager
from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace
from cmbench.seeds import HELD_OUT_FROM
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.training_run import obtain_run
from cmbench.sweep.tuned_sigmas import read_tuned
from cmbench.sweep.tuning import LevelScore, TuneSettings, objective_metric

Command = Callable[..., Any]
GMM = ("-m", "ict", "-d", "gmm", "-r", "smoke", "--samples", "200", "-q", "--threads", "1")
TUNE = (*GMM, "--evaluations", "5", "--rounds", "1")


@pytest.fixture
def trained(cmbench: Command) -> Command:
    assert cmbench("run", *GMM, "--nfe", "1", "--seeds", "2", "--no-report").code == 0
    return cmbench


def forget(workspace: Workspace) -> None:
    for path in tuned_files(workspace):
        path.unlink()


def tuned_files(workspace: Workspace) -> list[Path]:
    return sorted((workspace.root / "tuned").rglob("*.json"))


def test_tuned_sigmas_are_found_used_recorded_and_labelled(
    trained: Command, workspace: Workspace
) -> None:
    done = trained("tune-times", *TUNE, "--nfe", "2,3")
    assert done.code == 0, done.err
    files = tuned_files(workspace)
    assert [read_tuned(f).nfe for f in files] == [2, 3]
    two, three = map(read_tuned, files)
    assert (two.evaluations, two.samples, two.network_evaluations) == (6, 1200, 2400)
    assert three.evaluations == 11
    assert three.network_evaluations == 11 * 200 * 3
    assert two.metric == "fd-pixels"
    assert two.value < two.start_value
    assert two.sigmas[0] == two.start_sigmas[0] == 80.0
    assert two.held_out_seeds == (HELD_OUT_FROM,)

    done = trained("run", *GMM, "--nfe", "1,2", "--seeds", "2", "--sigmas", "tuned")
    assert done.code == 0, done.err
    records = [read_record(p) for p in workspace.records("gmm").glob("*.json")]
    tuned = [r for r in records if r.sampling.nfe == 2]
    assert [r.sampling.tuned for r in records if r.sampling.nfe == 1] == [None, None]
    assert sorted(r.training.seed for r in tuned) == [0, 1]
    for record in tuned:
        assert record.sampling.sigmas == list(two.sigmas)
        assert record.sampling.seed < HELD_OUT_FROM
        facts = record.sampling.tuned
        assert facts is not None
        assert facts["held_out_seeds"] == [HELD_OUT_FROM]
        assert facts["metric"] == "fd-pixels"
        assert facts["run"].startswith("gmm/ict-smoke-s0-")
        assert (facts["evaluations"], facts["samples"]) == (6, 1200)
        assert facts["search"].startswith("golden section over ln sigma, 5 evaluations")
    page = (workspace.reports / "gmm.md").read_text()
    marked = [line for line in page.splitlines() if "tuned sigmas" in line]
    assert len(marked) == 1
    assert "| 2 |" in marked[0]


def test_the_objective_is_what_a_record_measures(
    trained: Command, workspace: Workspace, context: Context
) -> None:
    assert trained("run", *GMM, "--nfe", "2", "--no-report").code == 0
    (path,) = workspace.records("gmm").glob("*-nfe2-*.json")
    record = read_record(path)
    run = plan_run(context, "ict", "gmm", "smoke", 0)
    cells = plan_cells(context, run, [2], 0, SampleSettings(num_samples=200))
    objective = LevelScore(context, obtain_run(context, run), cells, "fd-pixels")
    assert objective((80.0, 3.0)) != pytest.approx(record.metrics["fd-pixels"].value)
    assert objective(tuple(record.sampling.sigmas)) == record.metrics["fd-pixels"].value
    assert objective.key == record.metrics["fd-pixels"].key


def test_several_held_out_seeds_are_averaged_and_batches_do_not_matter(
    trained: Command, workspace: Workspace
) -> None:
    trained("tune-times", *TUNE, "--nfe", "2")
    found = read_tuned(tuned_files(workspace)[0])
    forget(workspace)
    again = trained("tune-times", *TUNE, "--nfe", "2", "--batch-size", "77")
    assert again.code == 0
    same = read_tuned(tuned_files(workspace)[0])
    assert same.sigmas == pytest.approx(found.sigmas)
    assert same.value == pytest.approx(found.value, rel=1e-6)
    # two seeds: the mean of what each of them says
    forget(workspace)
    trained("tune-times", *TUNE, "--nfe", "2", "--held-out-seeds", f"{HELD_OUT_FROM + 1}")
    other = read_tuned(tuned_files(workspace)[0])
    forget(workspace)
    trained(
        "tune-times",
        *TUNE,
        "--nfe",
        "2",
        "--held-out-seeds",
        f"{HELD_OUT_FROM}-{HELD_OUT_FROM + 1}",
    )
    both = read_tuned(tuned_files(workspace)[0])
    assert both.start_value == pytest.approx((found.start_value + other.start_value) / 2, rel=1e-6)
    assert both.samples == 2 * found.samples


@pytest.mark.parametrize(("metric", "sign"), [("kd", 1.0), ("precision", -1.0)])
def test_smaller_scores_are_better_whatever_the_metric(
    trained: Command, context: Context, metric: str, sign: float
) -> None:
    run = plan_run(context, "ict", "gmm", "smoke", 0)
    cells = plan_cells(context, run, (2,), HELD_OUT_FROM, SampleSettings(num_samples=200))
    score = LevelScore(context, obtain_run(context, run), cells, metric)
    levels = (80.0, 0.8)
    assert score(levels) == sign * score.values[levels] != 0.0


def test_levels_that_are_kept_are_not_replaced_without_a_word(
    trained: Command, workspace: Workspace
) -> None:
    first = trained("tune-times", *TUNE, "--nfe", "2")
    (path,) = tuned_files(workspace)
    before, changed_at = path.read_bytes(), path.stat().st_mtime_ns
    again = trained("tune-times", *TUNE, "--nfe", "2")
    assert (again.code, again.out) == (0, first.out)
    assert path.stat().st_mtime_ns == changed_at, "the same search: nothing is searched again"
    said = failure(trained, "tune-times", *TUNE, "--nfe", "3,2", "--sigma-min", "0.5")
    assert f"{path} holds the levels of another search: search golden section" in said
    assert "delete the file to search again" in said
    assert tuned_files(workspace) == [path], "refused before any of the work"
    assert path.read_bytes() == before
    path.write_text("{")
    assert trained("tune-times", *TUNE, "--nfe", "2").code == 0
    assert path.read_bytes() != b"{"


EDM = ("-m", "edm", *GMM[2:])
BENDS = (*EDM, "--search", "trajectories", "--sigma-min", "0.002")


def test_levels_by_the_bends_of_trajectories(cmbench: Command, workspace: Workspace) -> None:
    """For a diffusion model: chosen without a metric, measured, used, and marked as tuned."""
    assert cmbench("run", *EDM, "--nfe", "1", "--no-report").code == 0
    done = cmbench("tune-times", *BENDS, "--sampler", "euler", "--nfe", "3")
    assert done.code == 0, done.err
    (path,) = tuned_files(workspace)
    found = read_tuned(path)
    assert (found.evaluations, found.samples) == (2, 400)
    assert found.network_evaluations == 400 * 3 + 60 * 256
    assert found.search.startswith("GITS: the best of 60 Karras steps down to sigma 0.002")
    fine = sampling_karras_sigmas(60).tolist()
    assert all(min(abs(s - f) for f in fine) < 1e-9 for s in found.sigmas)
    assert found.sigmas[0] == 80.0
    assert len(set(found.sigmas)) == 3
    done = cmbench("run", *EDM, "--nfe", "3", "--sampler", "euler", "--sigmas", "tuned")
    assert done.code == 0, done.err
    records = map(read_record, workspace.records("gmm").glob("*-nfe3-*.json"))
    (tuned,) = (r.sampling.tuned for r in records)
    assert tuned is not None
    assert tuned["search"] == found.search


def test_the_level_of_one_evaluation_is_tuned_where_there_is_one_to_choose(
    cmbench: Command, workspace: Workspace
) -> None:
    """An analytic first step leaves the noise level of the evaluation itself."""
    assert cmbench("run", *EDM, "--nfe", "1", "--no-report").code == 0
    options = ("--sampler", "ipndm-afs", "--evaluations", "3")
    done = cmbench("tune-times", *EDM, *options, "--nfe", "1")
    assert done.code == 0, done.err
    (path,) = tuned_files(workspace)
    assert (read_tuned(path).nfe, len(read_tuned(path).sigmas)) == (1, 2)


def test_trajectories_need_a_diffusion_model(trained: Command, workspace: Workspace) -> None:
    said = failure(trained, "tune-times", *GMM, "--search", "trajectories")
    assert "--search trajectories" in said
    assert "does not train a diffusion model" in said
    assert trained("run", *EDM, "--nfe", "1", "--no-report").code == 0
    said = failure(trained, "tune-times", *BENDS, "--sampler", "euler", "--nfe", "61")
    assert "61 noise levels; allowed: up to 60, the points of its grid" in said
    assert tuned_files(workspace) == []


# ---- bad input ----------------------------------------------------------------------------------


def failure(cmbench: Command, *arguments: str) -> str:
    done = cmbench(*arguments)
    assert done.code in (2, 4)
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    return str(done.err)


def test_what_cannot_be_tuned_is_said_in_one_line(trained: Command, workspace: Workspace) -> None:
    said = failure(trained, "tune-times", *TUNE, "--nfe", "2,1")
    assert "no intermediate noise level, so there is nothing to tune" in said
    said = failure(trained, "tune-times", *TUNE, "--held-out-seeds", "0")
    assert "0 is a seed that records may use: not held out" in said
    said = failure(trained, "tune-times", *TUNE, "--held-out-seeds", "5-8")
    assert "5 is a seed that records may use" in said
    said = failure(trained, "tune-times", *TUNE, "--metric", "flow-map-mean")
    assert "'flow-map-mean' cannot be used for tuning" in said
    said = failure(trained, "tune-times", *TUNE, "--sampler", "heun")
    assert "multistep only" in said
    said = failure(trained, "tune-times", *TUNE, "--sigma-min", "100")
    assert "--sigma-min: 100 leaves no noise level to choose; allowed: below " in said
    assert tuned_files(workspace) == []
    said = failure(trained, "tune-times", "--method", "nothing")
    assert said.startswith("error: cmbench tune-times: unknown method 'nothing'")
    said = failure(trained, "tune-times", "-m", "ict", "-d", "nothing")
    assert "cmbench tune-times" in said
    assert "cmbench run:" not in said


def test_a_run_that_is_not_trained_is_not_tuned(cmbench: Command, workspace: Workspace) -> None:
    said = failure(cmbench, "tune-times", *TUNE)
    assert "is not trained" in said
    assert "cmbench run" in said
    assert not (workspace.root / "runs").exists()


def test_a_record_with_a_held_out_seed_is_noticed(trained: Command, workspace: Workspace) -> None:
    path = next(workspace.records("gmm").glob("*.json"))
    data = json.loads(path.read_text())
    data["sampling"]["seed"] = HELD_OUT_FROM
    path.write_text(json.dumps(data))
    assert f"{HELD_OUT_FROM} is the seed of record" in failure(trained, "tune-times", *TUNE)


def test_runs_do_not_use_held_out_seeds(cmbench: Command) -> None:
    said = failure(cmbench, "run", *GMM, "--seeds", f"0,{HELD_OUT_FROM}")
    assert "held out for `cmbench tune-times`" in said


def test_untuned_and_damaged_times_are_refused(trained: Command, workspace: Workspace) -> None:
    said = failure(trained, "run", *GMM, "--nfe", "2", "--sigmas", "tuned")
    assert "no tuned noise levels for ict on gmm, recipe smoke, NFE 2" in said
    trained("tune-times", *TUNE)
    path = tuned_files(workspace)[0]
    text, data = path.read_text(), read_sealed(path)
    path.write_text(text.replace(f'"nfe": {data["nfe"]}', '"nfe": 3'))
    assert "was changed after it was written" in failure(
        trained, "run", *GMM, "--nfe", "2", "--sigmas", "tuned"
    )
    path.write_text(json.dumps(data))
    assert "has no hash of its contents" in failure(
        trained, "run", *GMM, "--nfe", "2", "--sigmas", "tuned"
    )
    for levels in ([1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 1.0], [3.0, 0.0]):
        write_sealed(path, {**data, "sigmas": levels})
        assert "positive and descending" in failure(
            trained, "run", *GMM, "--nfe", "2", "--sigmas", "tuned"
        )
    write_sealed(path, {**data, "more": 1})
    assert "field 'more'" in failure(trained, "run", *GMM, "--nfe", "2", "--sigmas", "tuned")
    path.write_text("{")
    assert "is not JSON" in failure(trained, "run", *GMM, "--nfe", "2", "--sigmas", "tuned")


def test_the_verb_and_the_library_have_the_same_defaults() -> None:
    verb = {f.name: f.default for f in fields(TuneOptions)}
    library = {f.name: f.default for f in fields(TuneSettings) if f.name in verb}
    assert library == {name: verb[name] for name in library}
    assert library.keys() >= {"batch_size", "sigma_min", "evaluations", "rounds"}


def test_the_metric_is_the_first_that_scores_samples(plugins: PluginManager) -> None:
    gmm = plugins.datasets.get("gmm")
    context: Any = type("C", (), {"plugins": plugins})
    assert gmm.metrics[0] == "flow-map-mean"
    assert objective_metric(context, gmm, None) == "fd-pixels"
    assert objective_metric(context, plugins.datasets.get("digits"), None) == "fd-digits"
    with pytest.raises(UserError, match="name a metric of the dataset's protocol"):
        objective_metric(context, gmm, "fid")
    with pytest.raises(UserError, match="measures no metric of samples"):
        objective_metric(context, gmm._replace(metrics=("flow-map-mean",)), None)
