"""What training consists of: batches, draws, objectives, phases.

A part of the contract of methods (:mod:`cmbench.plugin.method`, which all of it is imported from).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from cmbench.errors import PluginError
from cmbench.plugin.config import EMAConfig, OptimizerConfig

#: The modules of a method by name: all of them in training, the sampled ones in sampling.
Nets = Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Training images ``[N, C, H, W]`` with labels int64 ``[N]`` (None when unconditional).

    ``augment_labels`` ``[N, 9]`` describe how the images were augmented. ``indices`` int64 ``[N]``
    are their numbers in the dataset, or in the stream if that is infinite.

    In a phase with :class:`GeneratedData`, ``noise`` float32 ``[N, C, H, W]`` is the unit noise of
    each pair and ``target`` float32 ``[N, C, H, W]`` what was made of it (``[N, S, C, H, W]`` if
    that is several states); ``labels`` are the pairs', ``images`` the targets (the last states).
    """

    images: Tensor
    labels: Tensor | None
    augment_labels: Tensor | None = None
    indices: Tensor | None = None
    noise: Tensor | None = None
    target: Tensor | None = None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """``noise`` and ``target``; an error outside of phases with generated data."""
        if self.noise is None or self.target is None:
            raise PluginError(
                "batch",
                "has no pair of noise and target",
                allowed="batches of a phase with generated data",
                remedy="give the phase generated=GeneratedData(...)",
            )
        return self.noise, self.target


class Draws(Protocol):
    """Named randomness. The same name in the same step gives the same numbers."""

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return standard normal numbers with the shape, dtype and device of ``like``."""

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1) with the shape, dtype and device of ``like``."""


@dataclass(frozen=True)
class Progress:
    """Where the training is. Counts are of the current phase, over all processes."""

    nimg: int
    total_nimg: int
    step: int
    total_steps: int
    scalars: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def log(self, name: str, value: Tensor) -> None:
        """Log the mean of ``value``; it stays on its device until the logging interval ends."""
        self.scalars[name] = value.detach().float().mean()


LossFunction = Callable[[Nets, Batch, Draws, Progress], Tensor]


@dataclass(frozen=True)
class Objective:
    """One optimizer: the modules it moves and the loss ``[N]`` that moves them.

    All other modules are frozen while the loss is computed. ``every`` is the number of steps
    between two updates. A loss of sets of images has a ``group`` size: the batch that it receives
    is whole groups of consecutive images, and it returns each image's share of its group's loss.
    """

    loss: LossFunction
    trains: tuple[str, ...]
    optimizer: OptimizerConfig
    every: int = 1
    group: int = 1


class PhaseStart(dict[str, Any]):
    """What a phase's ``start`` receives: the modules by name, with their weights as they are.

    Args:
        nets: the modules.
        draws: named randomness of this start.
        batch: ``batch(count)`` returns training images with their labels, the first of the phase.
        averaged: ``averaged(module, index=0)`` returns the state dict of a sampled module under an
            average of the phase before; its own weights if that phase kept none, or is the first.
        exported: ``exported(export, module="model", index=0)`` returns the state dict of a module
            as an earlier phase has exported it, under one of its averages (or its own weights).
    """

    draws: Draws
    batch: Callable[[int], Batch]
    averaged: Callable[..., dict[str, Tensor]]
    exported: Callable[..., dict[str, Tensor]]

    def __init__(
        self,
        nets: Nets,
        draws: Draws | None = None,
        batch: Callable[[int], Batch] | None = None,
        averaged: Callable[..., dict[str, Tensor]] | None = None,
        exported: Callable[..., dict[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(nets)
        self._known = {"draws": draws, "batch": batch, "averaged": averaged, "exported": exported}

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__.get("_known", {}).get(name)
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r} here")
        return found


@dataclass(frozen=True)
class GeneratedData:
    """What a phase trains on instead of the dataset's images: noise, and what a model makes of it.

    The harness makes the pairs before the phase begins, in shards, on all processes. They depend on
    their number only, are stored once in the workspace for all runs that ask for the same ones, and
    count as the run's cost.

    Args:
        count: pairs.
        make: ``make(nets, noise, labels)`` returns images ``[N, C, H, W]`` of unit ``noise``
            ``[N, C, H, W]``, or ``states`` images of each, ``[N, S, C, H, W]``, the last one clean.
            An image depends on its own noise and label only. No gradients.
        solver: how they are made, with every setting that matters: pairs with another text are
            others.
        nfe: network evaluations per pair; None if they differ from pair to pair.
        made_by: the modules whose weights ``make`` uses, none of which this phase trains. Empty for
            the teacher.
        states: images of each pair.
        dtype: what they are stored in, ``"float16"`` or ``"float32"``.
    """

    count: int
    make: Callable[[Nets, Tensor, Tensor | None], Tensor]
    solver: str
    nfe: int | None
    made_by: tuple[str, ...] = ()
    states: int = 1
    dtype: Literal["float16", "float32"] = "float16"


@dataclass(frozen=True)
class Phase:
    """A part of training. Each phase has new optimizers, schedules and averages.

    ``start`` is called once when the phase begins (not when it resumes); ``after_step`` after every
    optimizer step, for what is not learned by gradients (a target network's moving average).
    ``export`` names the variant that the phase's final weights become, for methods whose
    intermediate results are generators too. ``generated`` replaces the dataset's images by pairs;
    it is asked for after ``start``.
    """

    name: str
    images: int
    objectives: tuple[Objective, ...]
    ema: tuple[EMAConfig, ...]
    start: Callable[[PhaseStart], None] | None = None
    after_step: Callable[[Nets, Progress], None] | None = None
    export: str | None = None
    generated: GeneratedData | None = None
