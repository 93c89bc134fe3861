"""Sweeps: every cell ends as a record, whatever a method does, and nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import TOYS, Toy

from cmbench.errors import BusyError, InterruptedRunError, NonFiniteError, PluginError, UserError
from cmbench.leaderboard.rows import aggregate
from cmbench.leaderboard.verify import verify_record
from cmbench.plugin import hookimpl
from cmbench.plugin.discovery import PluginInfo
from cmbench.records.record import Record, read_record, write_record
from cmbench.records.reproduction import CannotReproduceError, Reproduction
from cmbench.sweep import protocol, sweep
from cmbench.sweep.cell_record import base_record
from cmbench.sweep.cells import open_samples_of
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.failures import where_raised
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.reproducing import find_cell, find_run, reproducer
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep
from cmbench.training.distributed import SharedFailureError, World


def request(*overrides: str, methods: tuple[str, ...] = ("toy",), **options: Any) -> SweepRequest:
    return SweepRequest(methods, "toys", overrides=overrides, **options)


def run(context: Context, *overrides: str, **options: Any) -> list[Record]:
    asked = request(*overrides, **options)
    return execute(context, plan_sweep(context, asked), Local())


def on_disk(context: Context) -> dict[str, Record]:
    folder = context.workspace.records("toys")
    return {path.stem: read_record(path) for path in folder.glob("*.json")}


# ---- what goes well -----------------------------------------------------------------------------


def test_each_cell_leaves_a_record_with_what_decides_it(toys: Context) -> None:
    records = run(toys, seeds=(0, 1), nfes=(1, 2, 3))
    assert [(r.training.seed, r.sampling.nfe, r.status) for r in records] == [
        (0, 1, "finished"),
        (0, 2, "finished"),
        (0, 3, "skipped"),
        (1, 1, "finished"),
        (1, 2, "finished"),
        (1, 3, "skipped"),
    ]
    assert on_disk(toys) == {r.cell: r for r in records}
    first, _, third = records[:3]
    assert third.reason == "the toy takes one or two steps"
    assert first.sampling.nfe_measured == 1
    assert first.sampling.sigmas == [2.0]
    assert first.plugin.model_dump() == {
        "name": "toys",
        "distribution": "toy-distribution",
        "version": "1.2.3",
    }
    assert (first.training.images_seen, first.training.network_evaluations) == (320, 960)
    assert first.training.config["optimizer"]["lr"] == 2e-3
    assert first.training.config["network"]["expansion"] == 1, "defaults are written out"
    assert first.training.ema == "halflife-0.05kimg"
    assert first.dataset.reference_count == 96
    assert first.environment.threads == 1
    assert first.rank_metric == "fd-pixels"
    assert first.metrics["fd-pixels"].detail["floor"]["value"] > 0
    folder = toys.workspace.records("toys")
    assert (folder / first.artifacts["grid"].file).read_bytes().startswith(b"\x89PNG")
    weights = toys.workspace.run(first.training.run) / "weights-final.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == (first.training.checkpoint_sha256)


def test_a_second_time_nothing_is_trained_or_measured(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(toys)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("already done")

    monkeypatch.setattr(sweep, "obtain_run", forbidden)
    monkeypatch.setattr(sweep, "measure_cell", forbidden)
    assert run(toys) == first
    assert plan_sweep(toys, request()).done.keys() == {r.cell for r in first}


def test_more_nfes_reuse_the_training(toys: Context) -> None:
    run(toys, nfes=(1,))
    log = toys.workspace.run(run(toys, nfes=(1,))[0].training.run) / "log.jsonl"
    before = log.stat().st_mtime_ns
    assert [r.sampling.nfe for r in run(toys, nfes=(1, 2))] == [1, 2]
    assert log.stat().st_mtime_ns == before


def test_extractor_and_reference_are_opened_once(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    reference = protocol.dataset_reference

    def noted(*given: Any) -> Any:
        opened.append(given[1].name)
        return reference(*given)

    monkeypatch.setattr(protocol, "dataset_reference", noted)
    run(toys, seeds=(0, 1))
    assert opened == ["toys"]


def test_numbers_do_not_depend_on_the_sampling_batch(toys: Context) -> None:
    values = []
    for size in (64, 10):
        settings = SampleSettings(batch_size=size)
        planned = plan_cells(toys, plan_run(toys, "toy", "toys", None, 0), (2,), 0, settings)
        trained = sweep.obtain_run(toys, planned[0].run)
        values.append(sweep.measure_cell(toys, trained, planned[0]).metrics["fd-pixels"].value)
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_the_identity_of_a_cell_is_what_decides_its_number(toys: Context) -> None:
    def names(*overrides: str, **settings: Any) -> set[str]:
        planned = plan_run(toys, "toy", "toys", None, settings.pop("seed", 0), overrides)
        chosen = SampleSettings(**settings)
        return {c.cell for c in plan_cells(toys, planned, (1,), 0, chosen)}

    same = names()
    assert names(batch_size=7) == names(precision="fp32") == same
    assert names("optimizer.lr=2e-3") == same, "an override that changes nothing"
    others = [
        names("optimizer.lr=1e-3"),
        names("network.width=24"),
        names(num_samples=9),
        names(sigmas=(3.0,)),
        names(ema="raw"),
        names(seed=1),
        names(sampler="other"),
        names(precision="bf16"),
        names(precision="fp16"),
    ]
    assert len(set().union(same, *others)) == 1 + len(others)


def test_a_width_has_one_name_whatever_other_averages_are_kept(toys: Context) -> None:
    kept = ("ema=[{halflife_kimg=0.05}, {sigma_rel=0.1}]",)
    planned = plan_run(toys, "toy", "toys", None, 0, kept)
    found = {
        cell.ema
        for label in ("power-0.1", "power-.10", "power-0.100")
        for cell in plan_cells(toys, planned, (1,), 0, SampleSettings(ema=label))
    }
    assert found == {"power-0.1"}


def test_precision_of_sampling_is_recorded_and_sets_rows_apart(toys: Context) -> None:
    (usual,) = run(toys, nfes=(1,))
    (lower,) = run(toys, nfes=(1,), sampling=SampleSettings(precision="bf16"))
    assert (usual.sampling.dtype, lower.sampling.dtype) == ("float32", "bfloat16")
    assert usual.training.run == lower.training.run, "trained once"
    values = [r.metrics["fd-pixels"].value for r in (usual, lower)]
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.1)
    rows = aggregate([(Path("a"), usual), (Path("b"), lower)])
    assert sorted(row.marks for row in rows) == [(), ("bfloat16",)]
    for record, precision in ((usual, "fp32"), (lower, "bf16")):
        again = find_cell(toys, find_run(toys, record).plan, record)
        assert (again.precision, again.cell) == (precision, record.cell)
    strange = lower.model_copy(
        update={"sampling": lower.sampling.model_copy(update={"dtype": "float8"})}
    )
    with pytest.raises(CannotReproduceError, match="does not sample in float8"):
        find_cell(toys, find_run(toys, strange).plan, strange)


def reproduced(context: Context, record: Record) -> Reproduction:
    return reproducer(context)(record, False)


def test_the_first_samples_are_made_again_exactly(toys: Context) -> None:
    """In the batches of the record, whatever its batch size."""
    for size in (500, 100, 300):
        settings = SampleSettings(num_samples=320, batch_size=size)
        record = run(toys, nfes=(2,), sampling=settings)[0]
        assert record.first_samples is not None
        assert record.first_samples.count == 256
        assert (record.first_samples.pixel_tolerance, record.sampling.batch_size) == (2.0, size)
        assert reproduced(toys, record).first_samples == record.first_samples
        path = toys.workspace.records("toys") / f"{record.cell}.json"
        checks = verify_record(path, reproduce=reproducer(toys))
        assert (checks[-3].name, checks[-3].state) == ("samples", "ok")
        other = record.dataset.model_copy(update={"reference_sha256": "0" * 64})
        moved = record.model_copy(update={"dataset": other})
        assert reproduced(toys, moved).first_samples == record.first_samples, "another machine's"
        strange = record.dataset.model_copy(update={"sha256": "1" * 64})
        with pytest.raises(CannotReproduceError, match="another sha256"):
            reproduced(toys, record.model_copy(update={"dataset": strange}))
        path.unlink()


def test_no_more_samples_are_made_again_than_are_compared(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SampleSettings(num_samples=1000, batch_size=100)
    (record,) = run(toys, nfes=(1,), sampling=settings)
    made: list[int] = []
    sample = Toy.sample

    def counted(self: Toy, nets: Any, noise: torch.Tensor, *more: Any) -> torch.Tensor:
        made.append(len(noise))
        return sample(self, nets, noise, *more)

    monkeypatch.setattr(Toy, "sample", counted)
    reproduced(toys, record)
    assert made == [100, 100, 100], "256 images, in batches as recorded"


def test_checksums_see_other_weights_and_other_pixels(toys: Context) -> None:
    (record,) = run(toys, nfes=(1,))
    (other,) = run(toys, nfes=(1,), seeds=(1,))
    assert record.first_samples is not None
    assert other.first_samples is not None
    assert record.first_samples.count == record.sampling.num_samples < 256
    assert record.first_samples.pixels_sha256 != other.first_samples.pixels_sha256
    assert record.first_samples.mean_feature != other.first_samples.mean_feature


@pytest.mark.parametrize(
    "fail",
    [lambda: torch.ones(2).expand(3), lambda: torch.nn.Linear(2, 2)(torch.ones(3))],
    ids=["in compiled code", "below frames of torch"],
)
def test_a_failure_inside_torch_is_placed_where_the_method_called_it(
    fail: Callable[[], object],
) -> None:
    with pytest.raises(RuntimeError) as raised:
        fail()
    assert where_raised(raised.value).startswith("test_sweeps.py:")


def test_conditional_runs_draw_labels(toys: Context) -> None:
    record = run(toys, recipe="classes", nfes=(1,))[0]
    assert (record.status, record.conditional) == ("finished", True)
    assert record.sampling.labels == "class frequencies of the dataset"


def test_labels_by_quota_have_cells_of_their_own_and_are_found_again(toys: Context) -> None:
    planned = plan_run(toys, "toy", "toys", "classes", 0)
    drawn, quota = (
        plan_cells(toys, planned, (1,), 3, SampleSettings(num_samples=33, labels=labels))[0]
        for labels in ("drawn", "quota")
    )
    assert drawn.cell != quota.cell
    trained = sweep.obtain_run(toys, planned)
    record = sweep.measure_cell(toys, trained, quota)
    assert record.sampling.labels == "exact quota of the class frequencies"
    assert find_cell(toys, planned, record).cell == quota.cell
    samples = open_samples_of(toys, trained, quota)
    sizes = toys.dataset("toys").class_counts
    batches = samples.source.batches(7)
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    counts = torch.bincount(labels, minlength=len(sizes))
    exact = [33 * size / sum(sizes) for size in sizes]
    assert all(abs(int(n) - share) < 1 for n, share in zip(counts, exact))


def test_labels_mean_nothing_to_unconditional_runs(toys: Context) -> None:
    planned = plan_run(toys, "toy", "toys", None, 0)
    names = {
        plan_cells(toys, planned, (1,), 0, SampleSettings(labels=labels))[0].cell
        for labels in ("drawn", "quota")
    }
    assert len(names) == 1
    with pytest.raises(UserError, match=r"labels: 'even'; allowed: drawn or quota"):
        SampleSettings(labels="even")


def test_a_finished_record_says_what_an_image_costs(toys: Context) -> None:
    first, again = (run(toys, nfes=(1,))[0] for _ in range(2))
    assert first.cost is not None
    assert first.cost.hardware == first.environment.hardware
    assert first.cost.latency_range_s[0] <= first.cost.latency_s <= first.cost.latency_range_s[1]
    assert first.cost.flops_per_image
    assert first.cost.decoder is None
    assert again == first, "an identical cell is reused with its cost"


def test_several_phases_export_their_weights(toys: Context) -> None:
    record = run(toys, recipe="staged", nfes=(1,))[0]
    folder = toys.workspace.run(record.training.run)
    assert {p.name for p in folder.glob("weights-*")} == {
        f"weights-{n}.{kind}" for n in ("part-0", "final") for kind in ("json", "safetensors")
    }
    assert record.training.images_seen == 640
    assert record.training.seconds_by_phase.keys() == {"part-0", "part-1"}


def test_samples_are_kept_only_if_asked_for(toys: Context) -> None:
    run(toys, nfes=(1,))
    assert not (toys.workspace.root / "samples").exists()
    record = run(toys, nfes=(2,), save_samples=True)[0]
    pictures = sorted(p.name for p in toys.workspace.samples(record.cell).iterdir())
    assert pictures == [f"{i:06d}.png" for i in range(64)]


# ---- what goes wrong ----------------------------------------------------------------------------

TROUBLES = {
    "raise": "method 'toy' failed while training: RuntimeError: the toy broke while training",
    "exit": "method 'toy' failed while training: SystemExit: the toy left",
    "nan-loss": "training phase 'part-0': the loss is not finite at 0 images seen; ",
    "nan-gradient": "training phase 'part-0': the gradient is not finite at 0 images seen; ",
    "mean-loss": "method Toy: its loss returned shape () for 32 images; allowed: one value per ",
    "list-loss": "method Toy: its loss returned list for 32 images; allowed: one value per image",
    "no-gradient": "method Toy: its loss does not depend on any trained parameter; ",
    "no-model": "method Toy: its build returned ['generator']; allowed: a dict of torch.nn.Module",
    "sample-raises": "method 'toy' failed while sampling: ValueError: sampling broke",
    "nan-images": "method Toy, sample hook: 1 of 64 images have NaN or infinite values (first: ",
    "wrong-shape": "method Toy, sample hook: returned shape (64, 1, 2, 1) for noise of shape ",
    "list-images": "method Toy, sample hook: returned list; allowed: a tensor shaped as the noise",
    "extra-call": "method Toy: declares NFE 1 but 2 network evaluations per image were counted; ",
    "around-the-wrapper": "method Toy: declares NFE 1 but 2 network evaluations per image were ",
    "plan-raises": "method 'toy' failed while planning NFE 1: KeyError: 'planning broke'",
    "plan-wrong-nfe": "method 'toy', plan_sampling: was asked for NFE 1 and plans 2; allowed: 1; ",
    "plan-ascending": "method 'toy', plan_sampling: gives noise levels (1.0, 2.0); allowed: desc",
    "plan-not-a-plan": "method 'toy', plan_sampling: returned tuple; allowed: a SamplingPlan",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_a_record_and_one_line(toys: Context, listener: Any, trouble: str) -> None:
    (record,) = run(toys, f"trouble={trouble}", nfes=(1,))
    assert record.status == "failed"
    assert record.reason.startswith(TROUBLES[trouble])
    assert "\n" not in record.reason
    raised = trouble in ("raise", "exit", "sample-raises", "plan-raises")
    assert (re.search(r" \(toy\.py:\d+\)$", record.reason) is not None) == raised
    assert on_disk(toys) == {record.cell: record}
    assert len(listener.warnings) == ("plan-" not in trouble)
    assert not any(record.reason in line for line in listener.warnings), "once, at the end"
    assert run(toys, f"trouble={trouble}", nfes=(1,))[0].status == "failed", "tried again"


def test_all_troubles_are_covered() -> None:
    from typing import get_args

    from toy import Trouble

    assert TROUBLES.keys() == set(get_args(Trouble)) - {""}


def test_one_methods_trouble_is_not_the_others(toys: Context, listener: Any) -> None:
    asked = SweepRequest(("broken-toy", "toy"), "toys", nfes=(1,))
    plan = plan_sweep(toys, asked)
    records = execute(toys, plan, Local())
    assert [r.status for r in records] == ["finished"]
    (line,) = plan.refused
    assert line == (
        "plugin 'toys' (toy-distribution 1.2.3): cannot import 'toy:Missing' for method "
        "'broken-toy': AttributeError: module 'toy' has no attribute 'Missing'; fix or reinstall "
        "that distribution"
    )
    with pytest.raises(PluginError, match="broken-toy"):
        plan_sweep(toys, SweepRequest(("broken-toy",), "toys"))


def test_a_nan_in_the_middle_keeps_the_last_good_checkpoint(toys: Context) -> None:
    (record,) = run(toys, "trouble=nan-loss", "trouble_nimg=224", nfes=(1,))
    assert "the loss is not finite at 224 images seen" in record.reason
    folder = toys.workspace.run(record.training.run) / "checkpoints"
    assert sorted(int(p.stem) for p in folder.glob("*.json")) == [96, 192]
    assert record.training.images_seen == 0, "no weights came of it"


def test_what_breaks_at_one_nfe_leaves_the_other(toys: Context, monkeypatch: Any) -> None:
    whole = sweep.measure_cell

    def measure(context: Context, trained: Any, cell: Any, **options: Any) -> Record:
        if cell.nfe == 1:
            raise ValueError("no room")
        return whole(context, trained, cell, **options)

    monkeypatch.setattr(sweep, "measure_cell", measure)
    assert [(r.status, r.reason.partition(" (")[0]) for r in run(toys)] == [
        ("failed", "method 'toy' failed while sampling: ValueError: no room"),
        ("finished", ""),
    ]


def test_a_dataset_that_cannot_be_opened_is_named(toys: Context) -> None:
    bad = TOYS._replace(name="bad-toys", factory="toy:add_toys")
    toys.plugins.datasets.add(bad, toys.plugins.methods.owners["toy"])
    asked = SweepRequest(
        ("toy",),
        "bad-toys",
        recipe=str(Path(__file__).parent.parent / "toy.toml") + ":demo",
        nfes=(1,),
    )
    with pytest.raises(UserError, match="has no recipe for dataset 'bad-toys'"):
        plan_sweep(toys, asked)
    own = toys.workspace.root / "own.toml"
    own.parent.mkdir(parents=True)
    own.write_text('[bad-toys.x]\nnetwork = { name = "mlp" }\nduration_kimg = 0.1\n')
    asked = SweepRequest(("toy",), "bad-toys", recipe=f"{own}:x", nfes=(1,))
    with pytest.raises(PluginError, match="dataset 'bad-toys': cannot be opened: TypeError: "):
        execute(toys, plan_sweep(toys, asked), Local())


# ---- stopping, and others at work ---------------------------------------------------------------


def stop_after(context: Context, calls: int) -> None:
    asked = iter([None] * calls)
    context.should_stop = lambda: next(asked, "stopped by a test")


def test_a_stop_in_training_saves_and_leaves_no_record(toys: Context) -> None:
    stop_after(toys, 4)
    with pytest.raises(InterruptedRunError) as raised:
        run(toys)
    assert raised.value.exit_code == 75
    assert "stopped by a test after 160 images; checkpoint saved; start the" in str(raised.value)
    assert not on_disk(toys)
    toys.should_stop = lambda: None
    assert [r.status for r in run(toys)] == ["finished", "finished"]


def test_a_stop_in_sampling_keeps_the_cells_that_are_done(toys: Context) -> None:
    stop_after(toys, 11)  # ten training steps and one batch of samples
    with pytest.raises(InterruptedRunError) as raised:
        run(toys)
    assert "stopped by a test; finished cells have their records" in str(raised.value)
    (done,) = on_disk(toys).values()
    toys.should_stop = lambda: None
    assert run(toys)[0] == done


def test_a_busy_run_does_not_stop_the_others(
    toys: Context, listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep.obtain_run

    def obtain(context: Context, plan: Any, variants: Any) -> Any:
        if plan.seed == 0:
            raise BusyError("run x", "another process is training it")
        return whole(context, plan, variants)

    monkeypatch.setattr(sweep, "obtain_run", obtain)
    with pytest.raises(BusyError, match="run x: another process is training it"):
        run(toys, seeds=(0, 1), nfes=(1,))
    assert [r.training.seed for r in on_disk(toys).values()] == [1]
    assert listener.warnings == []  # the error says it


def test_a_record_that_another_process_finished_meanwhile_stays(
    toys: Context, listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(nfes=(1,))
    plan = plan_sweep(toys, asked)
    (theirs,) = execute(toys, plan, Local())
    (ours,) = execute(toys, plan, Local())  # the plan still says: to do
    assert ours == theirs
    assert on_disk(toys) == {theirs.cell: theirs}
    assert any("another process finished it meanwhile" in note for note in listener.notes)


@pytest.mark.parametrize("text", ["{", json.dumps({"schema_version": 7})])
def test_a_corrupt_record_stops_before_any_work(toys: Context, text: str) -> None:
    (record,) = run(toys, nfes=(1,))
    path = toys.workspace.records("toys") / f"{record.cell}.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"record {path}: "):
        plan_sweep(toys, request(nfes=(1,)))


# ---- observers ----------------------------------------------------------------------------------


class Observer:
    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl
    def cmbench_run_started(self, run_id: str, plan: Any) -> None:
        assert Path(plan["folder"]).as_posix().endswith(run_id)
        self.seen.append(f"started {run_id.partition('-')[0]}, {plan['config']['batch_size']}")

    @hookimpl
    def cmbench_step_finished(self, nimg: int, scalars: Any) -> None:
        self.seen.append(f"step {nimg} {sorted(scalars)}")
        raise OSError("the logger is down")

    @hookimpl
    def cmbench_cell_finished(self, record: Record) -> None:
        self.seen.append(f"cell {record.sampling.nfe} {record.status}")


def test_observers_hear_what_happens_and_cannot_stop_it(toys: Context, listener: Any) -> None:
    observer = Observer()
    info = toys.plugins.register(observer, PluginInfo("watch", "w", "watch-dist", "1"))
    assert info.status == "ok"
    run(toys, nfes=(1, 3))
    assert observer.seen[:2] == ["cell 3 skipped", "started toys/toy, 32"]
    assert observer.seen[-1] == "cell 1 finished"
    assert any(line.startswith("step 320 ['grad_norm', 'images_per_s', ") for line in observer.seen)
    assert [w for w in listener.warnings if "watch" in w] == [
        "plugin 'watch': cmbench_step_finished raised OSError: the logger is down "
        "(reported once; the run continues)"
    ]


def test_refused_requests_are_cells_of_their_own(toys: Context) -> None:
    run_plan = plan_run(toys, "toy", "toys", None, 0)
    asked = [SampleSettings(), SampleSettings(sampler="x"), SampleSettings(sigmas=(80.0, 1.0, 0.5))]
    found = [plan_cells(toys, run_plan, (3,), 0, settings)[0] for settings in asked]
    assert all(c.sampling is None for c in found)
    assert len({c.cell for c in found}) == 3


def test_a_skipped_cell_of_a_distilled_run_names_its_teacher(
    context: Context, tmp_path: Path
) -> None:
    plan = plan_run(context, "cd", "digits", None, 0)
    assert plan.teacher is not None
    (cell,) = plan_cells(context, plan, (1,), 0, SampleSettings())
    made = base_record(context, cell, "skipped", None, "asked for the impossible")
    assert made.training.teacher == plan.teacher.run_id
    states = {c.name: c.state for c in verify_record(write_record(made, tmp_path))}
    assert states["recipe hash"] == "ok"
    older = made.model_copy(update={"training": made.training.model_copy(update={"teacher": None})})
    states = {c.name: c.state for c in verify_record(write_record(older, tmp_path))}
    assert states["recipe hash"] == "not checked"


@pytest.mark.parametrize(
    ("error", "shared"),
    [
        (NonFiniteError("training", "the loss is NaN"), True),
        (SharedFailureError("rank 1 of 2", "the toy broke", foreseen=True), True),
        (RuntimeError("perhaps in this process only"), False),
        (UserError("perhaps", "in this process only"), False),
    ],
)
def test_of_several_processes_only_a_shared_failure_becomes_a_record(
    toys: Context, monkeypatch: pytest.MonkeyPatch, error: Exception, shared: bool
) -> None:
    def failing(*_: Any) -> None:
        raise error

    (job,) = plan_sweep(toys, request(nfes=(1,))).jobs
    monkeypatch.setattr(sweep, "obtain_run", failing)
    toys.world = World(0, 2)
    if shared:
        (record,) = sweep.outcomes(toys, request(nfes=(1,)), job)
        assert record.status == "failed"
    else:
        with pytest.raises(type(error), match="in this process only"):
            list(sweep.outcomes(toys, request(nfes=(1,)), job))


class InductorError(RuntimeError):
    """As torch's compiler raises it."""


@pytest.mark.parametrize(
    "error",
    [
        InductorError("no C++ compiler"),
        SharedFailureError("rank 1 of 2", "InductorError: no C++ compiler", foreseen=False),
    ],
)
def test_a_failing_compiler_is_recorded_with_the_remedy(
    toys: Context, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sweep, "obtain_run", failing)
    (record, *_) = run(toys)
    assert record.status == "failed"
    assert record.reason.startswith(
        "torch.compile failed while training 'toy' (InductorError: no C++ compiler); add "
        "--no-compile"
    )
