"""The training loop.

:meth:`Trainer.train` is the whole story: for every phase, steps until its images are seen; between
steps, log, checkpoint and stop when asked. A step sees each shard of its batch, sums the losses,
and moves every optimizer once. All randomness of a step comes from (seed, image position).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.errors import BrokenRunError, NonFiniteError, PluginError
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Objective, PhaseStart, Progress
from cmbench.seeds import derive_seed
from cmbench.training.distributed import RELAYED, LostProcessError, SharedFailureError
from cmbench.training.generating import PairMaker, make_missing
from cmbench.training.memory import memory_explained
from cmbench.training.meter import Meter
from cmbench.training.optimizers import learning_rate
from cmbench.training.pairs import PairFeed
from cmbench.training.randomness import StepDraws, seed_global
from cmbench.training.settings import Feed, Settings, Watchers
from cmbench.training.state import TrainingState


class Trainer:
    """Trains a state to the end of its last phase.

    Args:
        state: the modules, with the phases of training.
        feed: training images by their position in the stream.
        settings: what does not depend on the method.
        watchers: callbacks between steps.
    """

    def __init__(
        self, state: TrainingState, feed: Feed, settings: Settings, watchers: Watchers | None = None
    ) -> None:
        self.state, self.feed, self.settings = state, feed, settings
        self.watchers = watchers or Watchers()
        self.nets = counted_networks(state, settings)
        #: the generated data of the current phase
        self._pairs: PairFeed | None = None
        self.meter = Meter(state, settings)

    def train(self) -> str | None:
        """Train; return why it stopped early, or None.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite. On the CPU the optimizer has not
                moved; on a GPU this is checked at the end of the logging interval, when weights may
                be unusable. No checkpoint is written in between.
            PluginError: the method's loss does not return one value per image.
            SharedFailureError: one of several processes failed.
            BrokenRunError: one of several processes failed, and they cannot go on together.
        """
        state = self.state
        for index in range(max(state.phase_index, 0), len(state.phases)):
            if index != state.phase_index:
                with self.settings.world.together():
                    state.enter(index, start=self.phase_start(index))
            if stop := self.generate():
                return stop
            while self.should_continue():
                due, unsaved, stop = self.step_together()
                if due:
                    self.log()
                if stop or unsaved or checkpoint_due(state, self.settings):
                    self.checkpoint()
                if stop:
                    return stop
            self.finish_phase()
        return None

    def generate(self) -> str | None:
        """Make or find the data that the current phase asks for; return why it stopped, or None."""
        state, settings, pairs = self.state, self.settings, self.watchers.pairs
        wanted = state.phase.generated
        self._pairs = None
        if wanted is None or pairs is None or not self.should_continue():
            return None
        stored = pairs.open(wanted)
        size = settings.microbatch_size or settings.batch_size // settings.world.size
        networks = [*self.nets.values(), *state.observed]
        maker = PairMaker(self.nets, networks, state.device, size, fixed_batch=settings.compile)
        with self.memory_of_step():
            stop = make_missing(
                stored, maker, settings.world, self.watchers.should_stop, pairs.progress
            )
        if stop is None:
            state.generated[state.phase.name] = stored.cost()
            self._pairs = PairFeed(stored, state.device)
            self.meter.begin()
        return stop

    def phase_start(self, index: int) -> PhaseStart:
        """Return what the start of phase ``index`` receives, before the phase is entered."""
        state, seed = self.state, self.settings.seed
        position = state.seen_nimg
        return PhaseStart(
            state.modules,
            StepDraws(derive_seed(seed, "phase", index), position),
            lambda count: self.feed.batch(position, count, seed),
            state.averaged_module,
            self.exported if self.watchers.exported is not None else None,
        )

    def exported(self, export: str, module: str = "model", index: int = 0) -> dict[str, Tensor]:
        """Return what an earlier phase has exported, split as the module is."""
        assert self.watchers.exported is not None
        return self.state.placed(module, self.watchers.exported(export, module, index))

    def should_continue(self) -> bool:
        """Return whether the current phase has images left."""
        return self.state.nimg < self.state.phase.images

    def step_together(self) -> tuple[bool, bool, str | None]:
        """Make a step; return what all processes agree to do next.

        Returns:
            Whether to log, whether to save because the last checkpoint is old, and why to stop (or
            None). A process that did one of these alone would leave the others waiting.
        """
        with in_step(self.state):
            failure = self.attempt_step()
            stop = self.watchers.should_stop()
            due, stopping, unsaved = self.settings.world.agree(
                self.meter.due(), bool(stop), self.meter.long_unsaved(), failure=failure
            )
        return due, unsaved, (stop or "stopped by another process") if stopping else None

    def log(self) -> None:
        """Report the interval's means."""
        scalars = self.meter.take()
        with self.settings.world.together():
            self.watchers.log(self.state, scalars)

    def checkpoint(self) -> None:
        """Write a checkpoint; no process continues before it is written."""
        self.meter.check_finite()
        with self.state.gathered(), self.settings.world.together():
            self.watchers.checkpoint(self.state)
        self.meter.saved()

    def finish_phase(self) -> None:
        """Report the phase's last interval and write its results."""
        scalars = self.meter.take()
        with self.state.gathered(), self.settings.world.together():
            self.watchers.log(self.state, scalars)
            self.watchers.phase_done(self.state)

    def attempt_step(self) -> BaseException | None:
        """Make a step; return what failed in this process, if there are others to tell."""
        world = self.settings.world
        try:
            with self.memory_of_step():
                self.train_step()
        except (SharedFailureError, LostProcessError, NonFiniteError):
            raise  # every process meets it
        except (Exception, SystemExit) as error:
            if world.size == 1:
                raise
            if self.state.sharding is not None:
                world.share(error)
            return error
        return None

    def train_step(self) -> None:
        """Make one optimizer step of every objective that is due, then update averages."""
        state, phase, batch_size = self.state, self.state.phase, self.settings.batch_size
        step = state.nimg // batch_size
        progress = Progress(state.nimg, phase.images, step, math.ceil(phase.images / batch_size))
        for index, objective in enumerate(phase.objectives):
            if step % objective.every == 0:
                state.zero_gradients(index, objective)
                self.meter.see_loss(self.forward_backward_step(index, objective, progress))
                self.optimizer_step(index, objective)
        state.nimg += batch_size
        state.seen_nimg += batch_size
        if phase.after_step is not None:
            with torch.no_grad(), state.mixed():
                phase.after_step(state.modules, progress)
        for average in state.averages:
            average.update(batch_size=batch_size, nimg=state.nimg)
        self.meter.see_step(progress, self.nets)

    def forward_backward_step(self, index: int, objective: Objective, progress: Progress) -> Tensor:
        """Back-propagate the mean loss of the batch, shard by shard; return it."""
        state, settings, world = self.state, self.settings, self.settings.world
        total = torch.zeros((), device=state.device)
        state.freeze_others(objective)
        whole = state.whole_parameters(objective)
        # If weights are split, the block itself waits for the other processes.
        together = world.together() if state.sharding is None else nullcontext()
        with together, self.memory_of_step():
            for first, count in world.shards(settings.batch_size, settings.microbatch_size):
                position = state.seen_nimg + first
                batch = (self._pairs or self.feed).batch(position, count, settings.seed)
                draws = StepDraws(settings.seed, position)
                seed_global(settings.seed, "dropout", position, index)
                per_image = objective.loss(self.nets, batch, draws, progress)
                require_one_per_image(state, per_image, count)
                loss = per_image.sum() / settings.batch_size
                state.scaler(index).scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            gradients = world.flat_gradients(whole)
        world.sum_gradients(whole, gradients)
        state.slice_gradients(objective)
        return world.sum(total)

    def optimizer_step(self, index: int, objective: Objective) -> None:
        """Make the optimizer step of an objective at the current learning rate."""
        state = self.state
        scaler, optimizer = state.scaler(index), state.optimizers[index]
        scaler.unscale_(optimizer)
        self.meter.see_gradient(scaler.blameless(clip(state, objective)), scaler.current())
        lr = learning_rate(
            objective.optimizer,
            nimg=state.nimg,
            total_nimg=state.phase.images,
            batch_size=self.settings.batch_size,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        for name in objective.trains:
            project_weights(state.modules[name])

    def memory_of_step(self) -> AbstractContextManager[None]:
        """Return :func:`memory_explained` for a step of this run."""
        return memory_explained(
            self.state.device,
            batch_size=self.settings.batch_size,
            processes=self.settings.world.size,
            microbatch_size=self.settings.microbatch_size,
            nimg=self.state.seen_nimg,
        )


@contextmanager
def in_step(state: TrainingState) -> Iterator[None]:
    """End all processes after a shared failure if GPUs wait for each other's slices.

    A process then learns of another's failure while its own stream still waits for slices that will
    not come, and what it sends for the next run would be taken for them.

    Raises:
        BrokenRunError: instead of :class:`SharedFailureError`; the leader prints it.
    """
    try:
        yield
    except SharedFailureError as error:
        if state.sharding is None or state.sharding.hosts_wait:
            raise
        broken = BrokenRunError(
            error.where,
            error.what,
            remedy="all processes end, because GPUs wait for its slices of the weights; start the "
            "same command again to resume training from the last good checkpoint",
        )
        if not state.sharding.world.leads:
            broken.add_note(RELAYED)
        raise broken from error


def project_weights(module: nn.Module) -> None:
    """Project weights onto their constraint, for networks that have one (EDM2's unit norms)."""
    normalize = getattr(module, "normalize_weights", None)
    if normalize is not None:
        with torch.no_grad():
            normalize()


def require_one_per_image(state: TrainingState, loss: object, count: int) -> None:
    """Raise :class:`PluginError` unless ``loss`` is a graded tensor ``[count]``."""
    if not isinstance(loss, Tensor):
        problem = f"its loss returned {type(loss).__name__} for {count} images"
    elif loss.shape != (count,):
        problem = f"its loss returned shape {tuple(loss.shape)} for {count} images"
    elif not loss.requires_grad:
        problem = "its loss does not depend on any trained parameter"
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
        # Blocks are compiled already; their weights are contiguous, their images need not be.
        compiled = False
        layout = torch.channels_last if state.device.type == "cuda" else None
    return {
        name: CountedNetwork(module, settings.precision, compiled, layout)
        for name, module in state.modules.items()
    }


def checkpoint_due(state: TrainingState, settings: Settings) -> bool:
    """Return whether a checkpoint interval has just been completed."""
    every = settings.checkpoint_nimg
    return every > 0 and state.nimg // every != (state.nimg - settings.batch_size) // every
