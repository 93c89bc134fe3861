"""What ``--dry-run`` says of costs, against steps that are really made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from command_outcome import Outcome
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toy import Toy

from cmbench.errors import BrokenRunError, MissingError
from cmbench.plugin.method import Batch, Draws, Nets, Phase, Progress
from cmbench.sweep import estimate as module
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import _Saved, count, estimate, seconds_per_image
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import build_modules, stand_in
from cmbench.training.augment import DatasetFeed
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState

SMALL = ("network.channels=8", "batch_size=4")


def planned(context: Context, method: str, *more: str) -> RunPlan:
    return plan_run(context, method, "digits", "smoke", 0, (*SMALL, *more))


def training(context: Context, plan: RunPlan) -> tuple[TrainingState, Callable[[], None]]:
    method, modules = build_modules(context, plan, stand_in(context, plan, build_modules))
    state = TrainingState(method, modules)
    settings = Settings(seed=0, batch_size=plan.config.batch_size, precision=plan.config.precision)
    feed = DatasetFeed(context.dataset("digits").to(context.device), plan.config)
    trainer = Trainer(state, feed, settings)
    state.enter(0)
    return state, trainer.train_step


@pytest.mark.parametrize("method", ["edm", "sct", "cd"])
def test_flops_are_those_of_a_real_step(context: Context, method: str) -> None:
    plan = planned(context, method)
    images, flops, *_ = count(context, plan)
    _, step = training(context, plan)
    with FlopCounterMode(display=False) as counter:
        step()
    assert images == 2560
    assert flops * 4 == counter.get_total_flops() > 0


def test_memory_is_what_a_real_step_keeps(context: Context) -> None:
    plan = planned(context, "edm")
    _, _, fixed, activations, _ = count(context, plan)
    state, step = training(context, plan)
    step()  # the optimizer has its moments
    numbers = sum(p.numel() for p in state.modules["model"].parameters())
    assert fixed == 4 * numbers * (1 + 1 + 2 + 1)  # weights, gradients, moments, one average
    saved = _Saved(state.modules)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda kept: kept):
        step()
    assert activations == pytest.approx(saved.bytes, rel=0.05)


def test_half_precision_and_shards_need_less(context: Context) -> None:
    whole = count(context, planned(context, "edm", "batch_size=64"))[3]
    half = count(context, planned(context, "edm", "batch_size=64", "precision=bf16"))[3]
    assert half < 0.8 * whole
    shards = count(context, planned(context, "edm", "batch_size=64", "microbatch_size=16"))[3]
    assert shards == pytest.approx(whole / 4, rel=0.05)


def test_every_built_in_method_is_counted(context: Context) -> None:
    for method, spec in context.plugins.methods.specs.items():
        if "digits" not in (spec.recipes.read_text() if spec.recipes else ""):
            continue
        cost = estimate(context, plan_run(context, method, "digits", "smoke", 0, SMALL))
        assert cost.flops_per_image, (method, cost.note)
        assert cost.device_hours, (method, cost.note)
        assert cost.note.startswith("3 steps of 4 images on cpu, 1 thread(s), ")


def test_hours_are_seconds_an_image_times_images(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "seconds_per_image", lambda *_: 36.0)
    cost = estimate(context, planned(context, "pd"))
    assert cost.device_hours == pytest.approx(cost.images / 100)
    assert cost.images > 1000


@pytest.mark.parametrize("explained", [True, False])
def test_a_calibration_that_does_not_fit_takes_fewer_images(
    context: Context, monkeypatch: pytest.MonkeyPatch, explained: bool
) -> None:
    def seconds(context: Context, plan: RunPlan, batch: int) -> float:
        if batch > 32:
            error = torch.OutOfMemoryError("tried 2 GiB")
            if explained:
                raise BrokenRunError("training", "out of memory") from error
            raise error
        return 36.0

    monkeypatch.setattr(module, "seconds_per_image", seconds)
    cost = estimate(context, planned(context, "edm", "batch_size=128"))
    assert cost.device_hours == pytest.approx(cost.images / 100)
    assert cost.note.startswith("3 steps of 32 images on cpu")


def test_a_calibration_times_the_steps_after_the_warm_up(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, took = [0.0], iter([100.0, 100.0, 8.0, 8.0, 8.0])
    step = Trainer.train_step

    def ticking(self: Trainer) -> None:
        step(self)
        clock[0] += next(took)

    monkeypatch.setattr(Trainer, "train_step", ticking)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert seconds_per_image(context, planned(context, "edm"), 4) == 2.0


def test_a_calibration_on_a_gpu_is_said_to_be_eager(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(context, "edm")
    monkeypatch.setattr(module, "count", lambda *_: (1000, 1e9, 0.0, 0.0, ()))
    monkeypatch.setattr(module, "seconds_per_image", lambda *_: 36.0)
    context.device = torch.device("cuda")
    assert estimate(context, plan).note.startswith("3 steps of 4 images on cuda, eager, ")


def test_counting_for_a_gpu_needs_none(context: Context) -> None:
    plan = planned(context, "edm")
    here = count(context, plan)
    context.device = torch.device("cuda")
    assert count(context, plan) == here


def test_advice_is_for_shards_that_are_no_larger_than_the_batch(context: Context) -> None:
    activations = 160 * 2**30
    asked = [planned(context, "edm", "batch_size=64")]
    asked.append(
        replace(asked[0], config=asked[0].config.model_copy(update={"microbatch_size": 1024}))
    )
    for plan in asked:
        assert module._advice(plan, 0.0, activations).startswith(
            "; -o microbatch_size=32 would fit 80 GiB"
        )


def test_what_is_too_large_to_measure_has_hours_at_a_stated_rate(context: Context) -> None:
    cost = estimate(context, plan_run(context, "edm", "cifar10", "paper", 0))
    assert cost.device_hours is None
    assert cost.flops_per_image is not None
    hours = cost.flops_per_image * cost.images / 1e14 / 3600
    assert f"on cpu; {hours:,.0f} h at 1e+14 FLOP/s" in cost.note


@pytest.mark.parametrize("method", ["cd", "scd"])
def test_exact_teachers_are_counted(context: Context, method: str) -> None:
    cost = estimate(context, plan_run(context, method, "gmm", None, 0))
    assert cost.flops_per_image, cost.note


def test_a_calibration_that_fails_leaves_what_was_counted(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, "seconds_per_image", broken)
    cost = estimate(context, planned(context, "edm"))
    assert cost.note == "not measured: RuntimeError: no such kernel"
    assert cost.device_hours is None
    assert cost.flops_per_image


def test_a_large_network_is_calibrated_on_one_image(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "count", lambda *_: (1000, 0.6e10, 0.0, 0.0, ()))
    monkeypatch.setattr(module, "seconds_per_image", lambda *_: 36.0)
    assert estimate(context, planned(context, "edm")).note.startswith("3 steps of 1 images on cpu")


def test_random_batches_are_like_those_of_the_data(context: Context) -> None:
    plan = planned(context, "edm", "conditional=true")
    phase = Phase("train", 1, (), ())
    batch = module._random_batch(plan.method(context), plan, 3, torch.device("cpu"), phase)
    real = context.dataset("digits").batch(0, 3, 0)
    assert batch.labels is not None
    assert real.labels is not None
    assert (batch.images.shape, batch.images.dtype) == (real.images.shape, real.images.dtype)
    assert (batch.labels.shape, batch.labels.dtype) == (real.labels.shape, real.labels.dtype)


def test_all_phases_count(toys: Context) -> None:
    assert estimate(toys, plan_run(toys, "toy", "toys", "staged", 0)).images == 640


class Scheduled(Toy):
    """A toy whose loss depends on the length of its training."""

    lengths: ClassVar[list[int]] = []

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        self.lengths.append(progress.total_nimg)
        return super().loss(nets, batch, draws, progress)


def test_a_counted_step_knows_the_length_of_the_training(toys: Context) -> None:
    Scheduled.lengths.clear()
    count(toys, replace(plan_run(toys, "toy", "toys", "demo", 0), method_class=Scheduled))
    assert set(Scheduled.lengths) == {320}


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_splitting_is_proposed_for_networks_that_fill_a_quarter_of_a_gpu(
    context: Context, share: float
) -> None:
    found = module._advice(planned(context, "edm"), share * 80 * 2**30, 1.0)
    each = "; split over 8 GPUs (--split), weights and averages take 5.0 GiB each"
    assert found == ("" if share == 0.25 else each)


def test_a_method_that_breaks_is_still_planned(toys: Context) -> None:
    cost = estimate(toys, plan_run(toys, "toy", "toys", "demo", 0, ("trouble=raise",)))
    assert cost.note == "not counted: RuntimeError: the toy broke while training"
    assert cost.device_hours is None


def test_published_size_without_data_or_gpu(
    cmbench: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = cmbench(
        "run",
        "-m",
        "sct",
        "-d",
        "imagenet64",
        "--nfe",
        "1",
        "--dry-run",
        "--device",
        "cpu",
        "-o",
        "network.blocks=1",
        "-w",
        str(tmp_path / "w"),
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    start = lines.index("cost of each seed (estimates)")
    teacher, student = lines[start + 2 : start + 4]
    assert student.startswith("sct-paper-s0-")
    assert " 819,200,000 " in student
    assert "e+11 FLOPs per image are too many for a short calibration" in student
    assert "GiB" in teacher
    assert not (tmp_path / "w").exists()


@pytest.mark.cuda
def test_peak_memory_on_cuda(context: Context) -> None:
    plan = plan_run(context, "edm", "digits", "smoke", 0, ("batch_size=1024",))
    context.device = torch.device("cuda")
    _, _, fixed, activations, _ = count(context, plan)
    _, step = training(context, plan)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    ratio = torch.cuda.max_memory_allocated() / (fixed + activations)
    assert 0.5 < ratio < 2.0


def test_a_learned_distance_is_counted_without_its_weights(context: Context) -> None:
    colour = ("network.channels=8", "batch_size=2")
    learned = plan_run(context, "cd", "cifar10", "paper", 0, colour)
    assert learned.config.model_dump()["metric"] == "lpips"
    plain = plan_run(context, "cd", "cifar10", "paper", 0, (*colour, "metric=l2"))
    assert count(context, learned)[1] > 10 * count(context, plain)[1]


def test_what_fits_no_gpu_is_told_the_way(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(context, "edm", "batch_size=64")
    monkeypatch.setattr(module, "seconds_per_image", lambda *_: 1.0)
    assert "microbatch_size" not in estimate(context, plan).note
    monkeypatch.setattr(module, "_GPU_BYTES", 0.3 * estimate(context, plan).peak_bytes)
    shard = int(re.search(r"-o microbatch_size=(\d+) would fit", estimate(context, plan).note)[1])
    assert 64 % shard == 0
    small = planned(context, "edm", "batch_size=64", f"microbatch_size={shard}")
    assert estimate(context, small).peak_bytes <= module._GPU_BYTES * 1.01
    larger = planned(context, "edm", "batch_size=64", f"microbatch_size={2 * shard}")
    assert estimate(context, larger).peak_bytes > module._GPU_BYTES, "the largest that fits"
    monkeypatch.setattr(module, "_GPU_BYTES", 1)
    assert "one image does not fit" in estimate(context, plan).note


def test_what_splitting_saves_is_said_where_weights_are_large(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(context, "edm")
    monkeypatch.setattr(module, "seconds_per_image", lambda *_: 1.0)
    assert "--split" not in estimate(context, plan).note
    fixed = count(context, plan)[2]
    monkeypatch.setattr(module, "_GPU_BYTES", 3.9 * fixed)
    said = (
        f"split over 8 GPUs (--split), weights and averages take {fixed / 8 / 2**30:.1f} GiB each"
    )
    assert said in estimate(context, plan).note


def test_bad_input_is_said_without_its_class(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise MissingError("weights", "are not there", remedy="get them")

    monkeypatch.setattr(module, "count", missing)
    cost = estimate(context, planned(context, "edm"))
    assert cost.note == "not counted: weights: are not there; get them"
