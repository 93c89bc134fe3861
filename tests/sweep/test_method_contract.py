"""What a method may rely on, and what is refused by name before any training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Toy

from cmbench.errors import PluginError, UserError
from cmbench.leaderboard.rows import aggregate
from cmbench.leaderboard.sections import sections
from cmbench.plugin.config import EMAConfig, OptimizerConfig
from cmbench.plugin.method import Batch, Draws, Kit, Nets, Objective, Phase, Progress, SamplingPlan
from cmbench.records.record import Record
from cmbench.sweep.cells import measure_cell
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import RunPlan, SampleSettings
from cmbench.sweep.runs import TrainedRun, build_modules, trained_teacher
from cmbench.sweep.training_run import obtain_run


def planned(context: Context, method_class: type[Toy], *overrides: str, seed: int = 0) -> RunPlan:
    plan = plan_run(context, "toy", "toys", "demo", seed, overrides)
    return replace(plan, method_class=method_class)


def measured(context: Context, trained: TrainedRun, nfe: int = 1, **settings: Any) -> Record:
    plan = replace(trained.plan)
    (cell,) = plan_cells(context, plan, [nfe], plan.seed, SampleSettings(**settings))
    return measure_cell(context, trained, cell)


class Gained(Toy):
    """Two trained networks: the samples are shifted by the second, which the kit did not build."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {**super().build(kit), "shift": nn.Linear(1, 4)}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        objective = Objective(self.loss, ("model", "shift"), self.config.optimizer)
        return [Phase("train", 320, (objective,), self.config.ema)]

    def sampled_modules(self, nets: Nets) -> tuple[str, ...]:
        return ("model", "shift")

    def denoise(self, network: Any, x: Tensor, labels: Tensor | None) -> Tensor:
        return super().denoise(network["model"], x, labels) + self.shifted(network, x)

    @staticmethod
    def shifted(nets: Any, x: Tensor) -> Tensor:
        shift: Tensor = nets["shift"](torch.ones(len(x), 1))
        return shift.reshape(x.shape)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        return super().loss({"model": nets}, batch, draws, progress)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        return super().denoise(nets["model"], noise, labels) + nets["shift"].bias.reshape(
            1, 1, 2, 2
        )


def test_a_second_sampled_network_is_averaged_saved_and_restored(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, Gained))
    tensors = trained.weights().tensors
    labels = {EMAConfig(**dict(c)).label for c in trained.plan.config.model_dump()["ema"]} | {"raw"}
    assert {k.partition("/")[0] for k in tensors if "/shift.bias" in k} == labels
    _, fresh = build_modules(toys, trained.plan, None)
    assert not torch.equal(fresh["shift"].bias, tensors["raw/shift.bias"])  # type: ignore[arg-type]
    averaged = trained.plan.main_average
    assert not torch.equal(tensors[f"{averaged}/shift.bias"], tensors["raw/shift.bias"])
    assert trained.result["parameters"] > sum(p.numel() for p in fresh["model"].parameters())
    whole, without = measured(toys, trained), measured(toys, trained, ema="raw")
    assert whole.metrics["fd-pixels"].value != without.metrics["fd-pixels"].value


class Forgot(Gained):
    """Samples with a trained module, and does not say so."""

    def sampled_modules(self, nets: Nets) -> tuple[str, ...]:
        return ("model",)


class Kept(Forgot):
    """The same, by a reference of its own."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        modules = super().build(kit)
        self.own = modules["shift"]
        return modules

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        return Toy.denoise(self, nets["model"], noise, labels) + self.shifted(
            {"shift": self.own}, noise
        )


@pytest.mark.parametrize("method_class", [Forgot, Kept])
def test_sampling_with_a_module_that_was_not_restored_is_an_error(
    toys: Context, method_class: type[Toy]
) -> None:
    trained = obtain_run(toys, planned(toys, method_class))
    with pytest.raises(PluginError) as raised:
        measured(toys, trained)
    assert str(raised.value) == (
        f"method {method_class.__name__}: sampling uses the module 'shift', which was not restored "
        "and is untrained; allowed: model; return its name from sampled_modules, which modules are "
        "saved by"
    )


def test_a_teacher_may_use_what_it_samples_only(toys: Context) -> None:
    class Taught(Forgot):
        def diffusion_model(self, nets: Nets) -> Any:
            return nets["shift"]

    trained = obtain_run(toys, planned(toys, Taught))
    with pytest.raises(PluginError, match="teacher other: sampling uses the module 'shift'"):
        trained_teacher(toys, "other", trained, trained.plan)


def test_a_run_starts_from_its_seed_whatever_builds_the_modules(toys: Context) -> None:
    """A module that a method makes itself is as reproducible as one of the kit."""

    def start(seed: int) -> bytes:
        torch.manual_seed(int.from_bytes(hashlib.sha256(bytes([seed])).digest()[:4], "little"))
        torch.rand(seed + 1)
        _, modules = build_modules(toys, planned(toys, Gained, seed=seed % 2), None)
        return modules["shift"].weight.detach().numpy().tobytes()  # type: ignore[operator, union-attr]

    assert start(0) == start(2)
    assert start(0) != start(1)


# ---- refused before any training ----------------------------------------------------------------


def phase(**changes: Any) -> Callable[[Toy, Nets], list[Phase]]:
    """Return a ``phases`` that is the toy's, but for some fields of its phase or objective."""

    def phases(self: Toy, nets: Nets) -> list[Phase]:
        fields = {"loss": self.loss, "trains": ("model",), "optimizer": OptimizerConfig()}
        objective = Objective(**(fields | {k: v for k, v in changes.items() if k in OF_OBJECTIVE}))  # type: ignore[arg-type]
        made = Phase("train", 320, (objective,), self.config.ema)
        return [replace(made, **{k: v for k, v in changes.items() if k not in OF_OBJECTIVE})]

    return phases


OF_OBJECTIVE = ("loss", "trains", "optimizer", "every")
BAD_PHASES = [
    (phase(trains=("modle",)), r"an objective that trains \('modle',\); allowed: .*any of model,"),
    (phase(trains=()), r"an objective that trains \(\)"),
    (phase(trains="model"), "an objective that trains 'model'"),
    (phase(every=0), "an objective every 0 steps; allowed: from 1"),
    (phase(optimizer={"lr": 1}), "the optimizer {'lr': 1}; allowed: an OptimizerConfig"),
    (phase(images=0), "its phase 'train' has 0 images; allowed: a whole number from 1"),
    (phase(objectives=()), r"the objectives \(\); allowed: one Objective or more"),
    (phase(ema=(0.999,)), r"the averages \(0.999,\); allowed: a tuple of EMAConfig"),
    (
        phase(export="../../../evil"),
        "its phase 'train' has the export '../../../evil'; allowed: up",
    ),
    (phase(export="a/b"), "the export 'a/b'"),
    (lambda self, nets: [], "its phases returned no phase; allowed: at least one Phase"),
    (lambda self, nets: None, "its phases returned None; allowed: a list of Phase"),
    (lambda self, nets: phase(export="a")(self, nets) * 2, r"the exports \['a', 'a'\]"),
]


@pytest.mark.parametrize(("phases", "problem"), BAD_PHASES)
def test_phases_that_cannot_be_trained_are_refused(
    toys: Context, phases: Any, problem: str
) -> None:
    plan = planned(toys, type("Staged", (Toy,), {"phases": phases}))
    with pytest.raises(PluginError, match=f"^method Staged: .*{problem}.*fix the plugin$"):
        obtain_run(toys, plan)
    written = [p.name for p in toys.workspace.root.rglob("*") if p.is_file()]
    assert not [name for name in written if name != ".lock"], "refused before any training"


def test_a_method_without_loss_or_phases_says_so(toys: Context) -> None:
    class Idle(Toy):
        phases = Toy.__mro__[1].phases  # type: ignore[assignment, attr-defined]

        def trained_modules(self, nets: Nets) -> tuple[str, ...]:
            return ("modle",)

    with pytest.raises(PluginError, match=r"method Idle: .* trains \('modle',\)"):
        obtain_run(toys, planned(toys, Idle))


@pytest.mark.parametrize("names", [("modle",), "model", ("model", "other"), ()])
def test_sampled_modules_that_do_not_exist_are_refused(toys: Context, names: Any) -> None:
    plan = planned(toys, type("Named", (Toy,), {"sampled_modules": lambda self, nets: names}))
    with pytest.raises(UserError, match=r"method Named: its sampled_modules returned .*'model'"):
        obtain_run(toys, plan)


@pytest.mark.parametrize("modules", [None, [], {"a.b": nn.Linear(1, 1)}, {"model": None}])
def test_modules_that_are_none_are_refused(toys: Context, modules: Any) -> None:
    plan = planned(toys, type("Built", (Toy,), {"build": lambda self, kit: modules}))
    with pytest.raises(UserError, match=r"method Built: its build returned .* a dict of torch.nn"):
        obtain_run(toys, plan)


# ---- guards of sampling -------------------------------------------------------------------------


class Normalized(Toy):
    """Samples that are normalized over their batch."""

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        x = super().sample(nets, noise, labels, plan, draws)
        return (x - x.mean(0)) / x.std(0, correction=0) / 3


class Unseeded(Toy):
    """Samples that draw from torch's global generator."""

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        return super().sample(nets, noise, labels, plan, draws) + torch.randn_like(noise) / 9


class Moving(Toy):
    """Changes the weights that it samples."""

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        x = super().sample(nets, noise, labels, plan, draws)
        next(nets["model"].module.parameters()).data.mul_(1.0 + 2**-20)
        return x


BATCH = "when they are made again in a smaller batch: the method's sample hook depends on the batch"


@pytest.mark.parametrize("nfe", [1, 2])
def test_samples_that_depend_on_themselves_only_are_not_warned_of(toys: Context, nfe: int) -> None:
    record = measured(toys, obtain_run(toys, planned(toys, Toy)), nfe)
    assert not [warning for warning in record.warnings if BATCH in warning]
    assert record.sampling.nfe_measured == nfe, "the check is not counted"


@pytest.mark.parametrize("method_class", [Normalized, Unseeded])
@pytest.mark.parametrize("settings", [{}, {"batch_size": 8}, {"num_samples": 6}])
def test_samples_that_depend_on_their_batch_are_warned_of(
    toys: Context, method_class: type[Toy], settings: dict[str, int]
) -> None:
    record = measured(toys, obtain_run(toys, planned(toys, method_class)), **settings)
    (warning,) = [warning for warning in record.warnings if BATCH in warning]
    assert warning.startswith(f"the first {settings.get('num_samples', 8)} samples differ by ")


def test_weights_that_change_while_sampling_are_an_error(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, Moving))
    with pytest.raises(PluginError, match="method Moving, sample hook: changed weights or buffers"):
        measured(toys, trained)


class Copying(Toy):
    """Returns images of the data, which score better than any generator."""

    pictures: Tensor

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        made = super().sample(nets, noise, labels, plan, draws)
        chosen = (draws.uniform("which", noise[:, 0, 0, 0]) * len(self.pictures)).long()
        return self.pictures[chosen] + 0 * made


def test_samples_that_are_training_images_are_never_ranked(toys: Context) -> None:
    Copying.pictures = toys.dataset("toys").batch(0, 96, 0).images
    cheat = measured(toys, obtain_run(toys, planned(toys, Copying)))
    honest = measured(toys, obtain_run(toys, planned(toys, Toy, "sigma=3")))
    assert cheat.copies["pixels"].copies == 64
    assert "64 of 64 samples are exact copies of real images" in " ".join(cheat.warnings)
    assert not any("never ranked" in warning for warning in honest.warnings)
    ranked, copied = sections(aggregate([(Path(r.cell), r) for r in (cheat, honest)]))
    assert (ranked.ranked, copied.ranked) == (True, False)
    assert [row.cells[0][1].cell for row in copied.rows] == [cheat.cell]
