"""What a phase's start sees, groups of images that shards never cut, and frozen modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toy import Toy

from cmbench.errors import InterruptedRunError, UserError
from cmbench.plugin.config import EMAConfig
from cmbench.plugin.method import Batch, Draws, Kit, Nets, Objective, Phase, PhaseStart, Progress
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import count
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import build_modules
from cmbench.sweep.training_run import obtain_run
from cmbench.training.augment import DatasetFeed
from cmbench.training.checkpoint import load_checkpoint
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState, under

AVERAGES = (EMAConfig(decay=0.9), EMAConfig(decay=0.5))


def planned(context: Context, method_class: type[Toy], **options: Any) -> RunPlan:
    plan = plan_run(context, "toy", "toys", "demo", 0, options)
    return replace(plan, method_class=method_class)


def whole(state: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


class Staged(Toy):
    """Three phases, each of which notes what its start sees."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {**super().build(kit), "teacher": kit.network()}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        objective = Objective(self.loss, ("model",), self.config.optimizer)
        names = ("first", "second", "third")
        return [Phase(n, 320, (objective,), AVERAGES, start=self.begin, export=n) for n in names]

    def begin(self, start: PhaseStart) -> None:
        batch = start.batch(4)
        found = {
            "raw": whole(start["model"].state_dict()),
            "averaged": whole(start.averaged("model")),
            "second average": whole(start.averaged("model", 1)),
            "draw": start.draws.normal("z", torch.zeros(3)),
            "images": batch.images,
            "labels": batch.labels,
        }
        for export in ("first", "second"):
            try:
                found[export] = whole(start.exported(export, index=1))
            except UserError as error:
                found[export] = str(error)
        start["teacher"].load_state_dict(start.averaged("model"))
        self.seen.append(found)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_start_sees_weights_averages_images_draws_and_what_was_exported(toys: Context) -> None:
    Staged.seen.clear()
    trained = obtain_run(toys, planned(toys, Staged))
    first, second, third = Staged.seen
    assert equal(first["raw"], first["averaged"]), "nothing was averaged before"
    assert "no finished phase has the export 'first'; allowed: none" in first["first"]
    assert "no finished phase has the export 'second'; allowed: first; fix" in second["second"]
    for name, start in [("first", second), ("second", third)]:
        file = load_checkpoint(trained.folder / f"weights-{name}.safetensors").tensors
        for label, key in [
            ("raw", "raw"),
            ("decay-0.9", "averaged"),
            ("decay-0.5", "second average"),
        ]:
            stored = under(file, f"{label}/model.")
            assert equal(stored, start[key]), (name, label)
        assert not equal(start["raw"], start["averaged"])
    assert equal(third["first"], second["second average"]), "of a phase before the last"
    assert equal(third["second"], third["second average"])
    draws = [start["draw"] for start in Staged.seen]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    dataset = toys.dataset("toys")
    for index, start in enumerate(Staged.seen):
        batch = dataset.batch(320 * index, 4, 0)
        assert torch.equal(start["images"], batch.images)
        assert start["labels"] is None or torch.equal(start["labels"], batch.labels)


def test_a_start_after_a_stop_sees_the_same(toys: Context, tmp_path: Any) -> None:
    Staged.seen.clear()
    elsewhere = replace(toys, workspace=type(toys.workspace)(tmp_path / "elsewhere"))
    reference = obtain_run(elsewhere, planned(toys, Staged)).weights().sha256
    expected = list(Staged.seen)
    Staged.seen.clear()
    plan = planned(toys, Staged)
    for steps in (10, 11, 3):  # at the end of the first phase, beyond that of the second, …
        asked = iter([None] * (steps - 1))
        toys.should_stop = lambda asked=asked: next(asked, "stopped")  # type: ignore[misc]
        with pytest.raises(InterruptedRunError):
            obtain_run(toys, plan)
    toys.should_stop = lambda: None
    assert obtain_run(toys, plan).weights().sha256 == reference
    assert len(Staged.seen) == len(expected)
    for found, wanted in zip(Staged.seen, expected, strict=True):
        assert equal(found["averaged"], wanted["averaged"])
        assert torch.equal(found["draw"], wanted["draw"])


def test_what_a_start_does_not_have_is_named() -> None:
    start = PhaseStart({"model": 1})
    assert dict(start) == {"model": 1}
    with pytest.raises(AttributeError, match="PhaseStart has no 'draws' here"):
        start.draws.normal("z", torch.zeros(1))


# ---- groups -------------------------------------------------------------------------------------


class Grouped(Toy):
    """A loss of pairs: each image's share of the squared error of its pair's mean."""

    sizes: ClassVar[set[int]] = set()

    def phases(self, nets: Nets) -> Sequence[Phase]:
        objective = Objective(self.loss, ("model",), self.config.optimizer, group=4)
        return [Phase("train", 320, (objective,), self.config.ema)]

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        self.sizes.add(len(batch.images))
        each = super().loss(nets, batch, draws, progress)
        return each.reshape(-1, 4).mean(1).repeat_interleave(4)


@pytest.mark.parametrize(("microbatch", "cut"), [(None, False), (8, False), (2, True), (1, True)])
def test_shards_never_cut_a_group(toys: Context, microbatch: int | None, cut: bool) -> None:
    Grouped.sizes.clear()
    plan = planned(toys, Grouped, microbatch_size=microbatch)
    if not cut:
        obtain_run(toys, plan)
        assert {microbatch or plan.config.batch_size} == Grouped.sizes
        return
    with pytest.raises(UserError) as raised:
        obtain_run(toys, plan)
    assert str(raised.value) == (
        f"phase 'train': shards of {microbatch} images cut its loss's groups of 4; allowed: a "
        "multiple of 4 images per forward pass and process; choose batch_size or microbatch_size "
        "accordingly"
    )
    assert not Grouped.sizes, "before any training"


def test_a_loss_of_groups_is_costed(toys: Context) -> None:
    Grouped.sizes.clear()
    images, flops, _, activations, _ = count(toys, planned(toys, Grouped))
    assert (images, flops > 0, activations > 0) == (320, True, True)
    assert all(size % 4 == 0 for size in Grouped.sizes)


# ---- two networks -------------------------------------------------------------------------------


class Against(Toy):
    """Two objectives on two networks, each of which runs through both."""

    frozen: ClassVar[set[tuple[str, bool, bool]]] = set()

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {**super().build(kit), "critic": kit.network()}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        objectives = tuple(
            Objective(self.both(name), (name,), self.config.optimizer) for name in nets
        )
        return [Phase("train", 320, objectives, self.config.ema)]

    def both(self, trained: str) -> Any:
        def loss(nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
            learn = [
                any(p.requires_grad for p in nets[n].parameters()) for n in ("model", "critic")
            ]
            self.frozen.add((trained, *learn))  # type: ignore[arg-type]
            made = self.denoise(nets["model"], batch.images, batch.labels)
            judged = self.denoise(nets["critic"], made, batch.labels)
            sign = 1 if trained == "model" else -1
            return sign * judged.flatten(1).mean(1)

        return loss


def test_modules_that_an_objective_does_not_train_are_frozen_meanwhile(toys: Context) -> None:
    Against.frozen.clear()
    trained = obtain_run(toys, planned(toys, Against))
    assert Against.frozen == {("model", True, False), ("critic", False, True)}
    tensors = trained.weights().tensors
    assert any(bool((v != 0).any()) for k, v in tensors.items() if k.startswith("raw/model."))


def test_what_is_frozen_costs_no_gradient(toys: Context) -> None:
    plan = planned(toys, Against)
    _, modules = build_modules(toys, plan, None)
    state = TrainingState(plan.method(toys), modules)
    dataset = toys.dataset("toys").to(toys.device)
    trainer = Trainer(state, DatasetFeed(dataset, plan.config), Settings(seed=0, batch_size=32))
    state.enter(0)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step()
    assert count(toys, plan)[1] * 32 == counter.get_total_flops() > 0


class WithTarget(Toy):
    """A toy with a module that follows the trained one, and one that is there to be asked."""

    modes: ClassVar[set[tuple[bool, bool, bool]]] = set()

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {**super().build(kit), "target": kit.network(), "fixed": kit.network()}

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        one, two, three = (nets[name].training for name in ("model", "target", "fixed"))
        self.modes.add((one, two, three))
        return super().loss(nets, batch, draws, progress)


def test_a_target_network_has_the_dropout_of_training_and_a_fixed_one_has_not(
    toys: Context,
) -> None:
    WithTarget.modes.clear()
    obtain_run(toys, planned(toys, WithTarget))
    assert WithTarget.modes == {(True, True, False)}
