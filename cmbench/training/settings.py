"""What the training loop receives: images, settings, and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cmbench.plugin.method import Batch
from cmbench.training.distributed import World
from cmbench.training.pairs import PairRoot
from cmbench.training.state import TrainingState


class Feed(Protocol):
    """Training images by their position in the stream."""

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return images ``start … start + count - 1`` of the stream that ``seed`` names."""


@dataclass
class Settings:
    """How a run is trained, independent of its method."""

    seed: int
    batch_size: int
    microbatch_size: int | None = None
    precision: str = "fp32"
    compile: bool = False
    checkpoint_nimg: int = 0
    #: write one at least this often: the time that a killed process can lose
    checkpoint_seconds: float = 1800.0
    log_seconds: float = 1.0
    world: World = field(default_factory=World)


@dataclass
class Watchers:
    """Callbacks between steps."""

    log: Callable[[TrainingState, Mapping[str, float]], None] = lambda state, scalars: None
    checkpoint: Callable[[TrainingState], None] = lambda state: None
    phase_done: Callable[[TrainingState], None] = lambda state: None
    should_stop: Callable[[], str | None] = lambda: None
    #: ``exported(export, module, index)``, see :class:`cmbench.plugin.method.PhaseStart`
    exported: Callable[..., dict[str, Tensor]] | None = None
    #: where phases with generated data store it; None leaves it to the feed
    pairs: PairRoot | None = None
