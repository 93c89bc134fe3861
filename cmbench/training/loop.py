"""The training loop.

``fit`` is the whole story: for every phase, steps until its images are seen; between steps, log,
checkpoint and stop when asked. A step sees each shard of its batch, sums the losses, and moves
every optimizer once. All randomness of a step comes from (seed, image position).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cmbench.errors import BrokenRunError, NonFiniteError, PluginError
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Batch, Objective, Progress
from cmbench.training.distributed import RELAYED, LostProcessError, SharedFailureError, World
from cmbench.training.memory import memory_explained
from cmbench.training.optimizers import learning_rate
from cmbench.training.randomness import StepDraws, seed_global
from cmbench.training.state import TrainingState


class Feed(Protocol):
    """Training images by their position in the stream."""

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return images ``start … start + count - 1`` of the stream that ``seed`` names."""


@dataclass
class Settings:
    """How a run is trained, apart from what its method says."""

    seed: int
    batch_size: int
    microbatch_size: int | None = None
    precision: str = "fp32"
    compile: bool = False
    checkpoint_nimg: int = 0
    #: also after so long without one: what a kill or a lost process can cost
    checkpoint_seconds: float = 1800.0
    log_seconds: float = 1.0
    world: World = field(default_factory=World)


@dataclass
class Watchers:
    """What the caller wants to happen between steps."""

    log: Callable[[TrainingState, Mapping[str, float]], None] = lambda state, scalars: None
    checkpoint: Callable[[TrainingState], None] = lambda state: None
    phase_done: Callable[[TrainingState], None] = lambda state: None
    should_stop: Callable[[], str | None] = lambda: None


def fit(state: TrainingState, feed: Feed, settings: Settings, watchers: Watchers) -> str | None:
    """Train ``state`` to the end of its last phase; return why it stopped early, or None.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite. On the CPU the optimizer has not
            moved; a GPU is asked at the end of the logging interval, and weights may be spoilt by
            then. No checkpoint is written in between.
        PluginError: the method's loss does not return one value per image.
        SharedFailureError: one of several processes failed.
        BrokenRunError: one of several processes failed, and they cannot go on together.
    """
    nets, world = counted_networks(state, settings), settings.world
    meter = Meter(state, settings)
    for index in range(max(state.phase_index, 0), len(state.phases)):
        if index != state.phase_index:
            with world.together():
                state.enter(index)
        while state.nimg < state.phase.images:
            with in_step(state):
                failure = attempt_step(state, nets, feed, settings, meter)
                stop = watchers.should_stop()
                # Together: who logs, stops or fails alone would leave the others waiting.
                due, stopping, old = world.agree(
                    meter.due(), bool(stop), meter.long_unsaved(), failure=failure
                )
            if stopping:
                stop = stop or "stopped by another process"
            if due:
                scalars = meter.take()
                with world.together():
                    watchers.log(state, scalars)
            if stop or old or checkpoint_due(state, settings):
                meter.check_finite()
                # Together: nobody leaves before the checkpoint is written.
                with state.gathered(), world.together():
                    watchers.checkpoint(state)
                meter.saved()
            if stop:
                return stop
        scalars = meter.take()
        with state.gathered(), world.together():
            watchers.log(state, scalars)
            watchers.phase_done(state)
    return None


@contextmanager
def in_step(state: TrainingState) -> Iterator[None]:
    """Make a shared failure the end of these processes, where GPUs wait for each other's slices.

    There a process hears of another's failure while its own stream still waits for slices that will
    not come: what it sends for the next run would be taken for them.

    Raises:
        BrokenRunError: instead of :class:`SharedFailureError`; the leader is to say it.
    """
    try:
        yield
    except SharedFailureError as error:
        if state.sharding is None or state.sharding.hosts_wait:
            raise
        broken = BrokenRunError(
            error.where,
            error.what,
            remedy="all processes end here, because GPUs wait for its slices of the weights; "
            "started again, training resumes from the last good checkpoint",
        )
        if not state.sharding.world.leads:
            broken.add_note(RELAYED)
        raise broken from error


def attempt_step(
    state: TrainingState, nets: Mapping[str, Any], feed: Feed, settings: Settings, meter: Meter
) -> BaseException | None:
    """Make a step; return what failed in this one of several processes, for all to hear of."""
    try:
        with memory_of_step(state, settings):
            train_step(state, nets, feed, settings, meter)
    except (SharedFailureError, LostProcessError, NonFiniteError):
        raise  # every process meets it
    except (Exception, SystemExit) as error:
        if settings.world.size == 1:
            raise
        if state.sharding is not None:
            settings.world.share(error)
        return error
    return None


def memory_of_step(state: TrainingState, settings: Settings) -> AbstractContextManager[None]:
    """Return :func:`memory_explained` for a step of this run."""
    return memory_explained(
        state.device,
        batch_size=settings.batch_size,
        processes=settings.world.size,
        microbatch_size=settings.microbatch_size,
        nimg=state.seen_nimg,
    )


def train_step(
    state: TrainingState, nets: Mapping[str, Any], feed: Feed, settings: Settings, meter: Meter
) -> None:
    """Make one optimizer step of every objective that is due, then update averages."""
    phase, batch_size = state.phase, settings.batch_size
    step = state.nimg // batch_size
    progress = Progress(state.nimg, phase.images, step, math.ceil(phase.images / batch_size))
    for index, objective in enumerate(phase.objectives):
        if step % objective.every:
            continue
        optimizer = state.optimizers[index]
        scaler = state.scaler(index)
        state.zero_gradients(index, objective)
        loss = accumulate(state, nets, objective, index, feed, settings, progress)
        meter.see_loss(loss)
        lr = learning_rate(
            objective.optimizer, nimg=state.nimg, total_nimg=phase.images, batch_size=batch_size
        )
        scaler.unscale(optimizer)
        meter.see_gradient(scaler.blameless(clip(state, objective)), scaler.scale())
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        for name in objective.trains:
            project_weights(state.modules[name])
    state.nimg += batch_size
    state.seen_nimg += batch_size
    if phase.after_step is not None:
        with torch.no_grad(), state.mixed():
            phase.after_step(state.modules, progress)
    for average in state.averages:
        average.update(batch_size=batch_size, nimg=state.nimg)
    meter.see_step(progress, nets)


def project_weights(module: nn.Module) -> None:
    """Put weights back on their constraint, for networks that have one (EDM2's unit norms)."""
    normalize = getattr(module, "normalize_weights", None)
    if normalize is not None:
        with torch.no_grad():
            normalize()


def accumulate(
    state: TrainingState,
    nets: Mapping[str, Any],
    objective: Objective,
    index: int,
    feed: Feed,
    settings: Settings,
    progress: Progress,
) -> Tensor:
    """Back-propagate the mean loss of the batch, shard by shard; return this process's share."""
    total = torch.zeros((), device=state.device)
    world, whole = settings.world, state.whole_parameters(objective)
    # Where weights are split, the block waits for the other processes itself.
    together = world.together() if state.sharding is None else nullcontext()
    with together, memory_of_step(state, settings):
        for first, count in world.shards(settings.batch_size, settings.microbatch_size):
            position = state.seen_nimg + first
            batch = feed.batch(position, count, settings.seed)
            draws = StepDraws(settings.seed, position)
            seed_global(settings.seed, "dropout", position, index)
            per_image = objective.loss(nets, batch, draws, progress)
            require_one_per_image(state, per_image, count)
            loss = per_image.sum() / settings.batch_size
            state.scaler(index).scaled(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        gradients = world.flat_gradients(whole)
    world.sum_gradients(whole, gradients)
    state.slice_gradients(objective)
    return world.sum(total)


def require_one_per_image(state: TrainingState, loss: object, count: int) -> None:
    """Raise :class:`PluginError` unless ``loss`` is a graded tensor ``[count]``."""
    if not isinstance(loss, Tensor):
        problem = f"its loss returned {type(loss).__name__} for {count} images"
    elif loss.shape != (count,):
        problem = f"its loss returned shape {tuple(loss.shape)} for {count} images"
    elif not loss.requires_grad:
        problem = "its loss depends on no parameter that is trained"
    else:
        return
    raise PluginError(
        f"method {type(state.method).__name__}",
        problem,
        allowed=f"one value per image, a tensor of shape ({count},) with a gradient",
        remedy="fix the method's loss",
    )


def clip(state: TrainingState, objective: Objective) -> Tensor:
    """Clip the gradient's norm if the recipe says so; return the norm before clipping."""
    norm = state.gradient_norm(objective)
    if norm is None:
        raise PluginError(
            f"method {type(state.method).__name__}",
            f"its loss has no gradient with respect to {', '.join(objective.trains)}",
            remedy="check that the loss uses those modules without detaching them",
        )
    if objective.optimizer.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(
            state.moved(objective), objective.optimizer.grad_clip, norm
        )
    return norm


def counted_networks(state: TrainingState, settings: Settings) -> dict[str, Any]:
    """Wrap every module that a loss may call for precision, compilation and counting."""
    state.scales_loss = settings.precision == "fp16"
    state.split(compiled=settings.compile)
    compiled, layout = settings.compile, None
    if state.sharding is not None:
        # Blocks are compiled already; their weights lie contiguous, their images need not.
        compiled = False
        layout = torch.channels_last if state.device.type == "cuda" else None
    return {
        name: CountedNetwork(module, settings.precision, compiled, layout)
        for name, module in state.modules.items()
    }


def checkpoint_due(state: TrainingState, settings: Settings) -> bool:
    """Say whether a checkpoint interval has just been completed."""
    every = settings.checkpoint_nimg
    return every > 0 and state.nimg // every != (state.nimg - settings.batch_size) // every


class Meter:
    """Means of what the loop sees, kept on the device between logging intervals."""

    def __init__(self, state: TrainingState, settings: Settings) -> None:
        self.state, self.settings = state, settings
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bad_nimg: Tensor | None = None
        self._started = self._last = self._saved = time.perf_counter()
        self._steps = 0

    def see_loss(self, loss: Tensor) -> None:
        """Refuse a non-finite loss (see :meth:`_refuse`) and log it."""
        self._add("loss", loss)
        self._refuse("loss", loss)

    def see_gradient(self, norm: Tensor, scale: Tensor | None = None) -> None:
        """Refuse a non-finite gradient, which a finite loss can have; log its norm."""
        self._add("grad_norm", norm.detach())
        self._refuse("gradient", norm.detach())
        if scale is not None:
            self._add("loss_scale", scale)

    def _refuse(self, what: str, value: Tensor) -> None:
        """Raise if ``value`` is not finite: at once on the CPU, at the interval's end on a GPU.

        Asking a GPU at every step would stall it; until the interval's end the position of the
        first bad value is kept on the device, and no checkpoint is written in between.
        """
        if value.device.type == "cpu":
            if not math.isfinite(value.item()):
                raise non_finite(self.state, self.state.seen_nimg, what)
            return
        if self._bad_nimg is None:
            self._bad_nimg = torch.full((), -1, dtype=torch.int64, device=value.device)
        fresh_bad = ~torch.isfinite(value) & (self._bad_nimg < 0)
        here = torch.full_like(self._bad_nimg, self.state.seen_nimg)
        self._bad_nimg = torch.where(fresh_bad, here, self._bad_nimg)

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteError` if any loss or gradient so far was not finite."""
        if self._bad_nimg is not None and (bad := int(self._bad_nimg.item())) >= 0:
            raise non_finite(self.state, bad)

    def see_step(self, progress: Progress, nets: Mapping[str, Any]) -> None:
        """Log what the method logged; count network evaluations and time."""
        for name, value in progress.scalars.items():
            self._add(name, value)
        for net in (*nets.values(), *self.state.observed):
            self.state.network_evaluations += net.forward_equivalents * self.settings.world.size
            net.forward_equivalents = 0
        now = time.perf_counter()
        name = self.state.phase.name
        self.state.seconds[name] = self.state.seconds.get(name, 0.0) + now - self._last
        self._last = now
        self._steps += 1

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def due(self) -> bool:
        """Say whether the logging interval is over."""
        return self._last - self._started >= self.settings.log_seconds

    def long_unsaved(self) -> bool:
        """Say whether the last checkpoint, or the start, was too long ago."""
        return self._last - self._saved >= self.settings.checkpoint_seconds

    def saved(self) -> None:
        """Count from now on: a checkpoint has just been written."""
        self._saved = time.perf_counter()

    def take(self) -> dict[str, float]:
        """Return the interval's means and start the next one."""
        self.check_finite()
        if not self._steps:
            return {}
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        means = {name: float(v) / self._counts[name] for name, v in self._sums.items()}
        means["images_per_s"] = self._steps * self.settings.batch_size / elapsed
        self._sums, self._counts, self._steps = {}, {}, 0
        self._started = time.perf_counter()
        return means


def non_finite(
    state: TrainingState, nimg: int, what: str = "loss or its gradient"
) -> NonFiniteError:
    """Return the error that stops a run whose loss or gradient is NaN or infinite."""
    return NonFiniteError(
        f"training phase {state.phase.name!r}",
        f"the {what} is not finite at {nimg} images seen",
        remedy="the last good checkpoint is kept; lower optimizer.lr or set optimizer.grad_clip",
    )
