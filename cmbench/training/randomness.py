"""Randomness of a training step: it depends on (seed, image position, name) only.

A step of ``n`` images that starts at image ``k`` of the stream draws from generators seeded with
``(seed, "train", name, k)``. With several processes each one's shard starts at its own ``k``, so
one process that accumulates the same shards draws the same numbers, and resuming equals never
stopping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmbench.seeds import derive_seed


@dataclass
class StepDraws:
    """Named draws of one shard (see :class:`cmbench.plugin.method.Draws`).

    A name stands for one distribution and one shape within a step; anything else raises
    ``ValueError``, because two different draws under one name would be the same random bits.
    """

    seed: int
    first_image: int
    _memory: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return standard normal numbers shaped as ``like``; the same name gives the same ones."""
        return self._draw("normal", name, like)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1) shaped as ``like``."""
        return self._draw("uniform", name, like)

    def _draw(self, kind: str, name: str, like: Tensor) -> Tensor:
        if name not in self._memory:
            generator = torch.Generator(like.device)
            generator.manual_seed(derive_seed(self.seed, "train", name, self.first_image))
            # A layout of its own: the numbers do not depend on the strides of ``like``.
            fresh = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            fill = fresh.normal_ if kind == "normal" else fresh.uniform_
            self._memory[name] = kind, fill(generator=generator)
        drawn_kind, drawn = self._memory[name]
        if (drawn_kind, drawn.shape, drawn.dtype) != (kind, like.shape, like.dtype):
            raise ValueError(
                f"draw {name!r} was {drawn_kind} of shape {tuple(drawn.shape)}, "
                f"now {kind} of shape {tuple(like.shape)}: give it another name"
            )
        return drawn


def seed_global(*names: int | str) -> None:
    """Seed torch's global generators (dropout, initial weights) from names.

    As ``torch.manual_seed``, without its queue of lazy calls for devices that are not in use: that
    formats three tracebacks a call and keeps every one of them.
    """
    seed = derive_seed(*names)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@dataclass(frozen=True)
class RandomState:
    """A snapshot of the global generators of one device, to draw the same dropout masks again."""

    device: torch.device
    state: Tensor

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """Take the snapshot: the CUDA generator's on CUDA, the CPU's on the CPU.

        openai/consistency_models restores the CPU's only, so its CUDA masks are not shared.
        """
        if device.type == "cuda":
            return cls(device, torch.cuda.get_rng_state(device))
        return cls(device, torch.get_rng_state())

    def restore(self) -> None:
        """Put the generator of the device back to the snapshot."""
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.state, self.device)
        else:
            torch.set_rng_state(self.state)


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Run a block with the snapshot's randomness, then continue where the caller was."""
    now = RandomState.of(state.device)
    state.restore()
    try:
        yield
    finally:
        now.restore()
