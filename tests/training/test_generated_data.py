"""Generated data: pairs that depend on their number only, made once, counted, resumed, checked."""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import Toy

from cmbench.cli.console import PlainReporter
from cmbench.errors import BusyError, InterruptedRunError, NonFiniteError, PluginError, UserError
from cmbench.plugin.method import (
    Batch,
    Draws,
    GeneratedData,
    Kit,
    Nets,
    Objective,
    Phase,
    PhaseStart,
    Progress,
)
from cmbench.records.workspace import Workspace
from cmbench.sweep import estimate as estimate_module
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import estimate
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import TrainedRun
from cmbench.sweep.training_run import obtain_run
from cmbench.training import generating, pairs
from cmbench.training.pairs import SEED, StoredPairs

COUNT = 80


class Distilled(Toy):
    """A toy that learns one step of a frozen network: from its noise to what that makes of it."""

    asked: ClassVar[dict[str, Any]] = {}
    seen: ClassVar[list[Batch]] = []
    made: ClassVar[list[int]] = []

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {**super().build(kit), "maker": kit.network()}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        wanted = GeneratedData(
            **{
                "count": COUNT,
                "make": self.make,
                "solver": "two steps",
                "nfe": 2,
                "made_by": ("maker",),
                **self.asked,
            }
        )
        objective = Objective(self.loss, ("model",), self.config.optimizer)
        images = round(self.config.duration_kimg * 1000)
        phase = Phase("distil", images, (objective,), self.config.ema, generated=wanted)
        return [replace(phase, start=self.start)]

    def start(self, nets: PhaseStart) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(nets["maker"].parameters()):
                parameter.add_(nets.draws.normal(f"maker-{number}", parameter) / 9)

    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        self.made.append(len(noise))
        first = self.denoise(nets["maker"], noise, labels)
        return self.denoise(nets["maker"], first + noise, labels)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        assert batch.noise is not None
        assert batch.target is not None
        self.seen.append(batch)
        made = self.denoise(nets["model"], batch.noise, batch.labels)
        last = batch.target if batch.target.ndim == 4 else batch.target[:, -1]
        return (made - last).square().flatten(1).sum(1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_SHARD_PAIRS", 16)
    Distilled.asked, Distilled.seen, Distilled.made = {}, [], []


def planned(context: Context, *options: str, recipe: str = "demo", seed: int = 0) -> RunPlan:
    plan = plan_run(context, "toy", "toys", recipe, seed, options)
    return replace(plan, method_class=Distilled)


def folder_of(context: Context) -> Path:
    (folder,) = (context.workspace.generated / "toys").iterdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.npy"))}


def weights(trained: TrainedRun) -> bytes:
    return (trained.folder / "weights-final.safetensors").read_bytes()


def test_batches_are_noise_and_what_is_made_of_it(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys))
    batch = Distilled.seen[0]
    assert batch.noise is not None
    assert batch.target is not None
    assert batch.labels is None
    assert (batch.noise.dtype, batch.target.dtype) == (torch.float32, torch.float32)
    assert torch.equal(batch.images, batch.target)
    stored = StoredPairs(folder_of(toys), a_wish(), (1, 2, 2), None)
    assert batch.indices is not None
    assert torch.equal(batch.noise, stored.noise(batch.indices.tolist()))
    assert batch.indices.unique().numel() == len(batch.indices) == 32
    seen = [b.indices.tolist() for b in Distilled.seen if b.indices is not None]
    first_pass = [i for part in seen for i in part][:COUNT]
    assert sorted(first_pass) == list(range(COUNT)), "every pair once in a pass"
    assert first_pass != sorted(first_pass)
    assert trained.result["exports"]["final"]["generated"]["distil"]["pairs"] == COUNT


def test_progress_is_of_a_task_that_was_begun(
    toys: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(toys)
    obtain_run(replace(toys, reporter=PlainReporter(every_s=0.0)), plan)
    said = capsys.readouterr().err
    assert f"generate data for {plan.name}: {COUNT} images" in said
    assert f"generate data for {plan.name}: {COUNT}/{COUNT} (100%)" in said


def a_wish() -> GeneratedData:
    def unused(*_: Any) -> Tensor:
        raise AssertionError

    return GeneratedData(COUNT, unused, "two steps", 2)


def test_a_pair_depends_on_its_number_only(toys: Context, tmp_path: Path) -> None:
    """Not on the batch, nor on the seed of the training: the maker's weights are the same."""
    obtain_run(toys, planned(toys))
    reference = files(folder_of(toys))
    other = Context(toys.plugins, Workspace(tmp_path / "b"), threads=1, device=toys.device)
    obtain_run(other, planned(other, "batch_size=8", "optimizer.lr=1e-4"))
    again = files(folder_of(other))
    assert reference.keys() == again.keys()
    for name in reference:
        one, two = (np.load(f / name) for f in (folder_of(toys), folder_of(other)))
        np.testing.assert_allclose(one.astype(float), two.astype(float), atol=2e-3)
        assert one.dtype == np.float16


def test_runs_share_pairs_and_each_counts_them(toys: Context) -> None:
    first = obtain_run(toys, planned(toys))
    assert sum(Distilled.made) == COUNT
    second = obtain_run(toys, planned(toys, "optimizer.lr=1e-4"))
    assert sum(Distilled.made) == COUNT, "made once"
    for trained in (first, second):
        export = trained.result["exports"]["final"]
        cost = export["generated"]["distil"]
        assert cost["network_evaluations"] == 2 * COUNT
        steps = 320 * 3  # a forward and a backward pass
        assert export["network_evaluations"] == steps + 2 * COUNT
        seconds = export["seconds_by_phase"]["distil, generated data"]
        assert seconds == pytest.approx(cost["seconds"], abs=1e-3)
        assert cost["seconds"] > 0
        images = COUNT * 4 * 2
        assert images < cost["bytes"] <= images + 5 * 128


@pytest.mark.parametrize(
    "asked",
    [{"count": 64}, {"solver": "another"}, {"dtype": "float32"}],
    ids=["count", "solver", "dtype"],
)
def test_other_pairs_are_others(toys: Context, asked: dict[str, Any]) -> None:
    obtain_run(toys, planned(toys))
    Distilled.asked = asked
    obtain_run(toys, planned(toys, "optimizer.lr=1e-4"))
    assert len(list((toys.workspace.generated / "toys").iterdir())) == 2


def test_other_weights_of_the_maker_make_others(toys: Context) -> None:
    obtain_run(toys, planned(toys))
    obtain_run(toys, planned(toys, seed=1))
    assert len(list((toys.workspace.generated / "toys").iterdir())) == 2


def test_several_states_and_labels(toys: Context) -> None:
    def make(nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        assert labels.dtype == torch.int64
        return torch.stack([noise, labels.float()[:, None, None, None].expand_as(noise)], 1)

    Distilled.asked = {"make": make, "states": 2, "nfe": None, "dtype": "float32"}
    obtain_run(toys, planned(toys, recipe="classes"))
    for batch in Distilled.seen:
        assert batch.noise is not None
        assert batch.target is not None
        assert batch.labels is not None
        assert torch.equal(batch.target[:, 0], batch.noise), "float32 is exact"
        assert torch.equal(batch.images[:, 0, 0, 0], batch.labels.float())
    labels = torch.cat([b.labels for b in Distilled.seen if b.labels is not None])
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == {0, 1, 2}


def test_damage_is_found_and_made_again(toys: Context) -> None:
    obtain_run(toys, planned(toys))
    folder = folder_of(toys)
    reference = files(folder)
    damaged = folder / "00002.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    (folder / "00003.json").unlink()
    Distilled.made.clear()
    obtain_run(toys, planned(toys, "optimizer.lr=1e-4"))
    assert sum(Distilled.made) == 32, "two shards"
    assert files(folder) == reference


def test_more_shards_than_a_process_may_have_files_open(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_SHARD_PAIRS", 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + COUNT // 2, limits[1]))
    try:
        obtain_run(toys, planned(toys))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(files(folder_of(toys))) == COUNT


def test_a_stop_keeps_what_was_made(toys: Context) -> None:
    asked = iter([None, None])
    toys.should_stop = lambda: next(asked, "stopped")
    with pytest.raises(InterruptedRunError, match="after 0 images"):
        obtain_run(toys, planned(toys))
    assert sum(Distilled.made) == 48
    toys.should_stop = lambda: None
    obtain_run(toys, planned(toys))
    assert sum(Distilled.made) == COUNT


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_resuming_equals_never_stopping(toys: Context, tmp_path: Path, steps: int) -> None:
    other = Context(toys.plugins, Workspace(tmp_path / "b"), threads=1, device=toys.device)
    whole = obtain_run(other, planned(other))
    asked = iter([None] * (5 + steps))
    toys.should_stop = lambda: next(asked, "stopped")
    with pytest.raises(InterruptedRunError, match=rf"after {32 * (steps + 1)} images"):
        obtain_run(toys, planned(toys))
    toys.should_stop = lambda: None
    resumed = obtain_run(toys, planned(toys))
    assert weights(resumed) == weights(whole)
    exports = [t.result["exports"]["final"] for t in (whole, resumed)]
    assert exports[0]["network_evaluations"] == exports[1]["network_evaluations"]


def train_slowly(root: str) -> None:
    """Train in a process that will be killed."""
    from toy import add_toys

    from cmbench.plugin.manager import load_plugins

    plugins = load_plugins()
    add_toys(plugins)
    pairs._SHARD_PAIRS = 4
    make = Distilled.make

    def slow(self: Distilled, *given: Any) -> Tensor:
        time.sleep(0.01)
        return make(self, *given)

    Distilled.make = slow  # type: ignore[method-assign]
    context = Context(plugins, Workspace(Path(root)), threads=1, device=torch.device("cpu"))
    obtain_run(context, planned(context))


def test_twenty_kills_leave_the_same_bytes(
    toys: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_SHARD_PAIRS", 4)
    trained = obtain_run(toys, planned(toys))
    reference, weights_of = files(folder_of(toys)), weights(trained)
    # Forks of a fresh process: one that has used autograd on another device cannot be forked.
    server: Any = get_context("forkserver")
    server.set_forkserver_preload(["torch", "cmbench.sweep.training_run", "toy"])
    root, rng = tmp_path / "killed", random.Random(0)
    kills = 0
    while kills < 20:
        process = server.Process(target=train_slowly, args=(str(root),))
        process.start()
        process.join(rng.uniform(0.02, 0.4))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            for path in root.rglob("*"):  # it has finished: from the start, with its pairs halved
                if path.is_file() and (path.parent.name != folder_of(toys).name or kills % 2):
                    path.unlink()
    last = server.Process(target=train_slowly, args=(str(root),))
    last.start()
    last.join(120)
    assert last.exitcode == 0
    other = Context(toys.plugins, Workspace(root), threads=1, device=toys.device)
    assert files(folder_of(other)) == reference
    left = {p.suffix for p in folder_of(other).iterdir()}
    assert left <= {".npy", ".json", ".lock", ""}, "no temporary file"
    assert weights(obtain_run(other, planned(other))) == weights_of


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"count": 0}, "generated data with count 0; allowed: from 1"),
        ({"count": 1.5}, "generated data with count 1.5"),
        ({"states": 0}, "generated data with states 0"),
        ({"nfe": -1}, "generated data with nfe -1"),
        ({"dtype": "float8"}, "generated data in 'float8'; allowed: float16 or float32"),
        ({"solver": ""}, "generated data by the solver ''"),
        ({"made_by": ("model",)}, r"made by \('model',\); allowed: a tuple of any of maker, not"),
        ({"made_by": "maker"}, "generated data made by 'maker'"),
        ({"made_by": ()}, "its data are made by a teacher, and the recipe names none"),
        ({"nfe": 3}, "declares 3 network evaluations per pair, 2 counted"),
        ({"states": 2}, r"make returned \(16, 1, 2, 2\); allowed: a tensor of shape \(16, 2, 1"),
        ({"make": lambda nets, noise, labels: None}, "make returned NoneType"),
    ],
    ids=lambda v: v[:12] if isinstance(v, str) else "-".join(v),
)
def test_wrong_wishes_are_refused_by_name(toys: Context, asked: dict[str, Any], says: str) -> None:
    Distilled.asked = asked
    with pytest.raises(UserError, match=says):
        obtain_run(toys, planned(toys, "batch_size=16"))


@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_images_that_cannot_be_stored_are_refused(toys: Context, value: float) -> None:
    Distilled.asked = {"make": lambda nets, noise, labels: noise * value}
    hint = "or give GeneratedData dtype='float32'"
    with pytest.raises(NonFiniteError, match=f"pairs 0 to 15 is not finite in float16.*{hint}"):
        obtain_run(toys, planned(toys, "batch_size=16"))
    assert not list(folder_of(toys).glob("*.npy"))


def test_augmented_pairs_are_refused(toys: Context) -> None:
    plan = planned(toys)
    plan = replace(plan, config=plan.config.model_copy(update={"augment": 0.1}))
    with pytest.raises(UserError, match=r"augment=0\.1, but its data are generated pairs"):
        obtain_run(toys, plan)


def test_two_trainings_do_not_make_the_same_pairs(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = generating.PairMaker.shard

    def meanwhile(self: Any, stored: StoredPairs, number: int) -> None:
        if number == 1:
            with pytest.raises(BusyError, match="another process makes it"):
                obtain_run(toys, planned(toys, "optimizer.lr=1e-4"))
        shard(self, stored, number)

    monkeypatch.setattr(generating.PairMaker, "shard", meanwhile)
    obtain_run(toys, planned(toys))


# ---- what it costs -------------------------------------------------------------------------------


def test_a_dry_run_knows_calls_disk_and_hours(toys: Context) -> None:
    cost = estimate(toys, planned(toys))
    (made,) = cost.generated
    assert (made.phase, made.pairs, made.evaluations, made.bytes) == ("distil", 80, 160, 640)
    assert made.device_hours is not None
    assert made.device_hours > 0
    whole = made.flops_per_pair

    def looks(nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        assert float(noise[0, 0, 0, 0]) > -9, "fake tensors have no values"
        return noise

    Distilled.asked = {"make": looks}
    (made,) = estimate(toys, planned(toys)).generated
    assert made.flops_per_pair == whole, "twice one call of the maker"
    Distilled.asked = {"nfe": None}
    (made,) = estimate(toys, planned(toys)).generated
    assert made.evaluations is None
    assert made.flops_per_pair == whole
    Distilled.asked = {"make": looks, "nfe": None}
    (made,) = estimate(toys, planned(toys)).generated
    assert (made.flops_per_pair, made.device_hours) == (None, None)


def test_hours_of_what_is_too_large_to_measure(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(estimate_module._STEP_FLOPS, "cpu", 1e-9)
    (made,) = estimate(toys, planned(toys)).generated
    assert made.flops_per_pair is not None
    assert made.device_hours == pytest.approx(made.flops_per_pair * COUNT / 1e14 / 3600)
    assert made.note == "at 1e+14 FLOP/s"


def test_noise_that_is_not_kept_is_drawn_again(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = weights(obtain_run(toys, planned(toys)))
    monkeypatch.setattr(pairs, "_KEPT_NOISE_BYTES", 0)
    trained = obtain_run(toys, planned(toys))
    (trained.folder / "result.json").unlink()
    for path in (trained.folder / "checkpoints").iterdir():
        path.unlink()
    assert weights(obtain_run(toys, planned(toys))) == kept


def test_noise_of_pairs_is_of_no_sampling_seed() -> None:
    assert SEED > 10**12


def test_a_batch_without_a_pair_says_what_the_phase_lacks() -> None:
    images = torch.zeros(2, 1, 2, 2)
    assert Batch(images, None, noise=images, target=images).pair == (images, images)
    for batch in (Batch(images, None), Batch(images, None, noise=images)):
        with pytest.raises(PluginError, match=r"has no pair.*generated=GeneratedData"):
            _ = batch.pair
