"""The loop: its contract with methods, and what it does when a number is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmbench.errors import NonFiniteError, PluginError
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.config import EMAConfig, MethodConfig, OptimizerConfig
from cmbench.plugin.method import Batch, DataInfo, Kit, Method, Objective, Phase, Progress
from cmbench.training import meter
from cmbench.training.distributed import World
from cmbench.training.loop import Trainer
from cmbench.training.randomness import StepDraws
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState

BATCH = 8
Loss = Callable[..., Tensor]


class Net(nn.Module):
    """``F(x, c_noise) = w x`` with dropout, on ``[N, 1, 1, 1]``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.dropout(self.weight * x)


class Feed:
    """Image ``k`` is the number ``k / 100``."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def batch(self, start: int, count: int, seed: int) -> Batch:
        self.asked.append((start, count))
        positions = torch.arange(start, start + count, dtype=torch.float32)
        return Batch((positions / 100).view(-1, 1, 1, 1), None)


def default_loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
    noise = draws.normal("noise", batch.images)
    predicted = nets["model"](batch.images + noise, torch.zeros(len(noise)))
    return (predicted - batch.images).square().flatten(1).sum(1)


class Given(Method):
    """A method with the phases that a test gives."""

    def __init__(self, *phases: Phase) -> None:
        super().__init__(
            MethodConfig(network={"name": "none"}, duration_kimg=1),
            DataInfo("d", (1, 1, 1), 0, 0.5),
        )
        self.given = phases

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        raise NotImplementedError

    def phases(self, nets: Any) -> tuple[Phase, ...]:
        return self.given

    def plan_sampling(self, *_: Any) -> Any:
        raise NotImplementedError

    def sample(self, *_: Any) -> Tensor:
        raise NotImplementedError


def phase(loss: Loss = default_loss, images: int = 4 * BATCH, **options: Any) -> Phase:
    trains = options.pop("trains", ("model",))
    optimizer = options.pop("optimizer", OptimizerConfig(lr=0.01))
    objective = Objective(loss, trains, optimizer, options.pop("every", 1))
    ema = options.pop("ema", (EMAConfig(decay=0.9),))
    return Phase(options.pop("name", "train"), images, (objective,), ema, **options)


def train(
    *phases: Phase,
    modules: dict[str, nn.Module] | None = None,
    watchers: Watchers | None = None,
    feed: Feed | None = None,
    **settings: Any,
) -> TrainingState:
    state = TrainingState(Given(*phases), modules or {"model": Net()})
    chosen = Settings(seed=3, batch_size=BATCH, **settings)
    Trainer(state, feed or Feed(), chosen, watchers).train()
    return state


def weight(state: TrainingState, name: str = "model") -> float:
    return float(state.modules[name].weight.detach())


# ---- the contract -------------------------------------------------------------------------------


def test_counters_and_images() -> None:
    feed = Feed()
    state = train(phase(images=20), feed=feed)
    assert feed.asked == [(0, BATCH), (BATCH, BATCH), (2 * BATCH, BATCH)]
    assert (state.nimg, state.seen_nimg, state.phase_index) == (24, 24, 0)
    assert weight(state) != 1.0


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda *a: default_loss(*a).mean(), r"shape \(\) for 8 images"),
        (lambda *a: default_loss(*a)[:-1], r"shape \(7,\) for 8 images"),
        (lambda *a: default_loss(*a)[:, None], r"shape \(8, 1\) for 8 images"),
        (lambda *a: default_loss(*a).tolist(), "returned list for 8 images"),
        (lambda *a: default_loss(*a).detach(), "does not depend on any trained parameter"),
    ],
)
def test_a_loss_is_one_graded_value_an_image(loss: Loss, found: str) -> None:
    with pytest.raises(PluginError, match=found) as raised:
        train(phase(loss))
    assert str(raised.value).startswith("method Given: its loss")
    assert "one value per image, a tensor of shape (8,) with a gradient" in str(raised.value)


def test_a_loss_that_moves_other_modules_only_is_refused() -> None:
    modules: dict[str, nn.Module] = {"model": Net(), "other": Net()}
    with pytest.raises(PluginError, match="no gradient with respect to other"):
        train(
            phase(trains=("model",)),
            phase(
                trains=("other",),
                loss=lambda n, b, d, p: (
                    default_loss({"model": n["model"]}, b, d, p)
                    + n["model"].weight * 0
                    + b.images.flatten() * nn.Parameter(torch.ones(()))
                ),
            ),
            modules=modules,
        )


def test_only_named_modules_are_trained() -> None:
    modules: dict[str, nn.Module] = {"model": Net(), "frozen": Net()}
    seen: list[tuple[bool, bool]] = []

    def loss(nets: Any, *rest: Any) -> Tensor:
        seen.append((nets["model"].training, nets["frozen"].training))
        return default_loss(nets, *rest) + 0 * nets["frozen"].weight

    state = train(phase(loss), modules=modules)
    assert weight(state) != 1.0
    assert weight(state, "frozen") == 1.0
    assert set(seen) == {(True, False)}


def test_accumulated_shards_are_the_mean_of_the_batch() -> None:
    """Without randomness, cutting a batch into shards changes rounding only."""

    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        return (nets["model"](batch.images, torch.zeros(1)) - 1).square().flatten(1).sum(1)

    whole, cut = train(phase(loss)), train(phase(loss), microbatch_size=2)
    assert weight(whole) == pytest.approx(weight(cut), rel=1e-5)


def stepped(*, grad_clip: float | None = None, lr: float = 0.1) -> tuple[float, dict[str, float]]:
    """The weight and the log after one step of plain SGD, in shards of two of eight images.

    Adam hides a factor of the gradient; SGD moves by ``lr`` times the gradient itself.
    """
    rows: list[Mapping[str, float]] = []

    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        target = 100 * batch.images  # the image's position
        return (nets["model"](torch.ones_like(target), torch.zeros(1)) - target).square().flatten()

    optimizer = OptimizerConfig(lr=lr, grad_clip=grad_clip)
    state = TrainingState(Given(phase(loss, images=BATCH, optimizer=optimizer)), {"model": Net()})
    state.enter(0)
    state.optimizers = [torch.optim.SGD(state.modules["model"].parameters(), lr=lr)]
    watchers = Watchers(log=lambda state, row: rows.append(row))
    Trainer(state, Feed(), Settings(3, BATCH, microbatch_size=2, log_seconds=1e9), watchers).train()
    assert len(rows) == 1
    return weight(state), dict(rows[0])


#: Of ``(w - k)^2`` at w = 1, over images 0 to 7: the means of ``(1 - k)^2`` and of ``2 (1 - k)``.
MEAN_LOSS, MEAN_GRADIENT = 11.5, -5.0


def test_loss_and_gradient_are_means_over_the_batch_not_over_a_shard() -> None:
    moved, row = stepped()
    assert row["loss"] == pytest.approx(MEAN_LOSS)
    assert row["grad_norm"] == pytest.approx(-MEAN_GRADIENT)
    assert moved == pytest.approx(1.0 - 0.1 * MEAN_GRADIENT)


def test_the_norm_that_is_clipped_is_the_mean_gradients() -> None:
    """A bound just above the norm changes nothing, one below it is met; logged is the norm."""
    above, row = stepped(grad_clip=-1.2 * MEAN_GRADIENT)
    assert above == pytest.approx(1.0 - 0.1 * MEAN_GRADIENT)
    assert row["grad_norm"] == pytest.approx(-MEAN_GRADIENT)
    below, row = stepped(grad_clip=2.0)
    assert below == pytest.approx(1.0 + 0.1 * 2.0, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(-MEAN_GRADIENT)


def test_every_second_step_and_several_objectives() -> None:
    calls: list[str] = []

    def named(name: str) -> Loss:
        def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
            calls.append(f"{name}{progress.step}")
            net = nets[name]
            return (net(batch.images, torch.zeros(1)) - 1).square().flatten(1).sum(1)

        return loss

    both = Phase(
        "both",
        4 * BATCH,
        (
            Objective(named("model"), ("model",), OptimizerConfig(lr=0.1)),
            Objective(named("other"), ("other",), OptimizerConfig(lr=0.1), every=2),
        ),
        (),
    )
    state = train(both, modules={"model": Net(), "other": Net()})
    assert calls == ["model0", "other0", "model1", "model2", "other2", "model3"]
    assert weight(state) != weight(state, "other") != 1.0


def test_phases_start_once_with_fresh_optimizers_and_averages() -> None:
    events: list[str] = []

    def start(nets: Mapping[str, nn.Module]) -> None:
        events.append("start")
        with torch.no_grad():
            nets["model"].weight.fill_(5.0)

    def after_step(nets: Any, progress: Progress) -> None:
        assert not torch.is_grad_enabled()
        events.append(f"{progress.step}/{progress.total_steps}")

    done: list[str] = []
    watchers = Watchers(phase_done=lambda state: done.append(state.phase.name))
    state = train(
        phase(name="a", images=BATCH),
        phase(name="b", images=2 * BATCH, start=start, after_step=after_step),
        watchers=watchers,
    )
    assert events == ["start", "0/2", "1/2"]
    assert done == ["a", "b"]
    assert (state.nimg, state.seen_nimg) == (2 * BATCH, 3 * BATCH)
    assert float(state.averages[0].average[0]) == pytest.approx(5.0, abs=0.05)


def test_checkpoints_come_at_their_interval_and_at_a_stop() -> None:
    at: list[int] = []
    watchers = Watchers(checkpoint=lambda state: at.append(state.seen_nimg))
    train(phase(images=100), watchers=watchers, checkpoint_nimg=20)
    assert at == [24, 40, 64, 80, 104]
    at.clear()
    asked = iter([None, None, "the limit"])
    watchers.should_stop = lambda: next(asked)
    state = TrainingState(Given(phase(images=100)), {"model": Net()})
    assert Trainer(state, Feed(), Settings(3, BATCH), watchers).train() == "the limit"
    assert at == [24]


def test_a_checkpoint_comes_when_the_last_one_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, []

    def log(state: TrainingState, scalars: Mapping[str, float]) -> None:
        nonlocal now
        now += 10.0  # a step of ten seconds

    monkeypatch.setattr(meter.time, "perf_counter", lambda: now)
    watchers = Watchers(log, lambda state: written.append(state.nimg))
    train(phase(images=10 * BATCH), watchers=watchers, log_seconds=0.0, checkpoint_seconds=30.0)
    assert written == [4 * BATCH, 8 * BATCH], "each after 30 s without one, seen after a step"


def test_what_a_method_logs_is_averaged_over_the_interval() -> None:
    rows: list[Mapping[str, float]] = []

    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        progress.log("position", batch.images)
        return default_loss(nets, batch, draws, progress)

    train(phase(loss), watchers=Watchers(log=lambda state, row: rows.append(row)), log_seconds=1e9)
    assert len(rows) == 1
    assert rows[0]["position"] == pytest.approx(0.155)  # mean of 0 … 31, over 100
    assert rows[0].keys() >= {"loss", "grad_norm", "images_per_s"}


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        return 1e6 * nets["model"](torch.ones_like(batch.images), torch.zeros(1)).flatten()

    plain = OptimizerConfig(name="adamw", lr=0.1, eps=1.0)
    clipped = plain.model_copy(update={"grad_clip": 1e-3})
    free, bound = (train(phase(loss, images=BATCH, optimizer=o)) for o in (plain, clipped))
    assert weight(free) == pytest.approx(0.9, abs=1e-3)
    assert weight(bound) == pytest.approx(1.0, abs=1e-3)


class Normed(Net):
    """Keeps its weight at one of two levels, as EDM2 keeps its weights' norms."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized = 0

    def normalize_weights(self) -> None:
        assert not torch.is_grad_enabled()
        self.normalized += 1
        self.weight.copy_(torch.tensor(2.0))


def test_trained_weights_are_put_back_on_their_constraint_after_each_step() -> None:
    seen: list[float] = []

    def after_step(nets: Mapping[str, nn.Module], progress: Progress) -> None:
        seen.append(float(nets["model"].weight.detach()))

    def loss(nets: Any, *rest: Any) -> Tensor:
        return default_loss(nets, *rest) + nets["plain"].weight

    modules = {"model": Normed(), "frozen": Normed(), "plain": Net()}
    options: dict[str, Any] = {"trains": ("model", "plain"), "ema": (EMAConfig(decay=0.5),)}
    recipe = phase(loss, 3 * BATCH, after_step=after_step, **options)
    state = train(recipe, modules=dict(modules))
    assert seen == [2.0, 2.0, 2.0]
    assert [m.normalized for m in modules.values() if isinstance(m, Normed)] == [3, 0]
    assert weight(state, "plain") != 1.0
    average = float(state.averages[0].average[0])
    assert average == pytest.approx(2.0 - 0.5**3), "averaged behind it"


# ---- not finite ---------------------------------------------------------------------------------


class Gradient(torch.autograd.Function):
    """The identity whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("inf")


def breaking(how: str, at: int) -> Loss:
    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        value = default_loss(nets, batch, draws, progress)
        if progress.nimg < at:
            return value
        return Gradient.apply(value) if how == "gradient" else value * float(how)

    return loss


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_optimizer_moves(how: str) -> None:
    saved: dict[int, float] = {}
    watchers = Watchers(checkpoint=lambda s: saved.__setitem__(s.seen_nimg, weight(s)))
    state = TrainingState(Given(phase(breaking(how, 5 * BATCH), 100)), {"model": Net()})
    with pytest.raises(NonFiniteError) as raised:
        Trainer(state, Feed(), Settings(3, BATCH, checkpoint_nimg=BATCH), watchers).train()
    what = "gradient" if how == "gradient" else "loss"
    assert str(raised.value) == (
        f"training phase 'train': the {what} is not finite at 40 images seen; the last good "
        "checkpoint is kept; lower optimizer.lr or set optimizer.grad_clip"
    )
    assert list(saved) == [8, 16, 24, 32, 40]
    assert weight(state) == saved[40], "the optimizer has not moved"
    assert all(torch.isfinite(a).all() for a in state.averages[0].average)


def test_what_a_loss_is_told_of_where_training_is_and_of_its_draws() -> None:
    """The last step of a phase is begun if images are left, and counts as one."""
    told: list[Progress] = []
    drawn: list[Tensor] = []

    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        told.append(progress)
        drawn.append(draws.normal("noise", batch.images))
        return default_loss(nets, batch, draws, progress)

    train(phase(loss, images=BATCH), phase(loss, images=20), microbatch_size=4)
    places = [(p.nimg, p.total_nimg, p.step, p.total_steps) for p in told[::2]]
    assert places == [(0, 8, 0, 1), (0, 20, 0, 3), (8, 20, 1, 3), (16, 20, 2, 3)]
    for index, noise in enumerate(drawn):
        assert torch.equal(noise, StepDraws(3, 4 * index).normal("noise", noise))


# ---- randomness ---------------------------------------------------------------------------------


def test_a_step_depends_on_its_position_alone() -> None:
    """Dropout and draws are the same whatever happened before: other phases, logging, stops."""
    once = train(phase(images=80), modules={"model": Net(dropout=0.5)})
    torch.manual_seed(99)
    state = TrainingState(Given(phase(images=80)), {"model": Net(dropout=0.5)})
    watchers = Watchers(should_stop=lambda: "again" if torch.rand(()) >= 0 else None)
    while Trainer(state, Feed(), Settings(3, BATCH), watchers).train():
        torch.rand(17)
    assert weight(state) == weight(once)


def test_dropout_masks_differ_between_steps_shards_and_objectives() -> None:
    masks: list[Tensor] = []

    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        kept = nets["model"](torch.ones(len(batch.images), 1, 1, 64), torch.zeros(1))
        masks.append((kept != 0).flatten())
        return kept.square().flatten(1).mean(1)

    objectives = tuple(Objective(loss, ("model",), OptimizerConfig(lr=1e-4)) for _ in range(2))
    two_steps = Phase("train", 2 * BATCH, objectives, ())
    train(two_steps, modules={"model": Net(dropout=0.5)}, microbatch_size=4)
    assert len(masks) == 2 * 2 * 2
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)
    assert all(0.3 < mask.float().mean() < 0.7 for mask in masks)


def test_another_seed_is_another_run() -> None:
    first = train(phase())
    state = TrainingState(Given(phase()), {"model": Net()})
    Trainer(state, Feed(), Settings(4, BATCH), Watchers()).train()
    assert weight(state) != weight(first)


# ---- counting -----------------------------------------------------------------------------------


def test_network_evaluations_of_training_are_counted() -> None:
    teacher = CountedNetwork(Net().requires_grad_(False))

    def loss(nets: Any, batch: Batch, draws: Any, progress: Progress) -> Tensor:
        with torch.no_grad():
            teacher(batch.images, torch.zeros(1))
            nets["model"](batch.images, torch.zeros(1))
        return default_loss(nets, batch, draws, progress)

    state = TrainingState(Given(phase(loss)), {"model": Net()})
    state.observed = [teacher]
    Trainer(state, Feed(), Settings(3, BATCH), Watchers()).train()
    # an image: one forward of the teacher, one of the student, one graded forward (3)
    assert state.network_evaluations == 4 * BATCH * 5


def test_the_state_survives_a_trip_through_tensors() -> None:
    def build() -> TrainingState:
        return TrainingState(Given(phase(images=32), phase(images=64)), {"model": Net(0.3)})

    whole = build()
    Trainer(whole, Feed(), Settings(3, BATCH), Watchers()).train()
    parts = build()
    steps = iter(["now"] * 5)
    watchers = Watchers(should_stop=lambda: next(steps, None))
    while Trainer(parts, Feed(), Settings(3, BATCH), watchers).train():
        tensors = {k: v.clone() for k, v in parts.tensors().items()}
        meta = parts.meta()
        parts = build()
        parts.load(tensors, meta)
    assert parts.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert torch.equal(parts.tensors()[name], tensor), name
    assert {k: v for k, v in parts.meta().items() if k != "seconds"} == {
        k: v for k, v in whole.meta().items() if k != "seconds"
    }


def test_one_process_with_the_shards_of_two_is_two_processes() -> None:
    """The sum of what two ranks compute alone is what one rank accumulates."""

    def gradients(world: World, feed: Feed) -> Tensor:
        state = TrainingState(Given(phase()), {"model": Net(dropout=0.5)})
        state.enter(0)
        progress = Progress(0, 32, 0, 4)
        settings = Settings(3, BATCH, microbatch_size=4, world=Alone(world.rank, world.size))
        Trainer(state, feed, settings).forward_backward_step(0, state.phase.objectives[0], progress)
        return state.modules["model"].weight.grad

    class Alone(World):
        """A rank that does not talk to the others."""

        def sum(self, value: Tensor) -> Tensor:
            return value

        def sum_gradients(self, parameters: Any, flat: Tensor | None) -> None:
            return

        def agree(self, *flags: bool, failure: BaseException | None = None) -> tuple[bool, ...]:
            assert failure is None
            return flags

    together = gradients(World(0, 2), Feed()) + gradients(World(1, 2), Feed())
    assert float(together) == pytest.approx(float(gradients(World(), Feed())), rel=1e-6)
