"""Per-image randomness: image ``i`` gets the same noise whatever batch or process makes it.

Numbers are drawn on the CPU, one generator per image, seeded with ``(seed, name, i)``: a CPU and a
GPU start from the same noise. For a GPU they can be drawn ahead, in a thread, while it works on the
batch before, and travel from pinned memory without the host waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cmbench.seeds import derive_seed

Kind = Literal["normal", "uniform"]


@dataclass(frozen=True)
class Drawing:
    """What a batch asks for: a name, a distribution, and the shape of one image's numbers."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    def make(self, seed: int, indices: Sequence[int], *, pinned: bool = False) -> Tensor:
        """Draw it on the CPU: float32 ``[N, …]``, row i from image i's seed."""
        out = torch.empty((len(indices), *self.shape), dtype=torch.float32, pin_memory=pinned)
        flat = out.reshape(len(out), -1) if self.kind == "uniform" else out
        for row, index in zip(flat, indices, strict=True):
            generator = torch.Generator().manual_seed(derive_seed(seed, self.name, index))
            if self.kind == "normal":
                row.normal_(generator=generator)
            else:
                row.uniform_(generator=generator)
        return out


@dataclass(frozen=True)
class ImageDraws:
    """Named draws for the images ``indices`` (see :class:`cmbench.plugin.method.Draws`).

    ``ready`` are drawings made ahead; ``asked`` collects what was asked for.
    """

    seed: int
    indices: Sequence[int]
    ready: Mapping[Drawing, Tensor] = field(default_factory=dict, compare=False, repr=False)
    asked: dict[Drawing, None] = field(default_factory=dict, compare=False, repr=False)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return standard normal numbers like ``like`` ``[N, …]``, row i from image i's seed."""
        return self._drawn(name, "normal", like)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1) shaped as ``like``."""
        return self._drawn(name, "uniform", like)

    def _drawn(self, name: str, kind: Kind, like: Tensor) -> Tensor:
        if len(like) != len(self.indices):
            raise ValueError(
                f"draw {name!r} asks for {len(like)} images, the batch has {len(self.indices)}"
            )
        drawing = Drawing(name, kind, tuple(like.shape[1:]))
        self.asked[drawing] = None
        out = self.ready.get(drawing)
        if out is None:
            out = drawing.make(self.seed, self.indices, pinned=like.device.type == "cuda")
        return out.to(like.device, like.dtype, non_blocking=True)


class DrawsAhead:
    """Draws the next batch in a thread: what this batch asks for, the next will too.

    Numbers do not depend on when they are drawn; a drawing that was not foreseen is made on
    demand. To be closed, as a context, when the last batch is made.
    """

    def __init__(self, seed: int, *, pinned: bool) -> None:
        self.seed, self.pinned = seed, pinned
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draws")
        self._coming: tuple[list[int], Future[dict[Drawing, Tensor]]] | None = None

    def __enter__(self) -> DrawsAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def draws(self, indices: Sequence[int]) -> ImageDraws:
        """Return the draws of a batch, ready as far as :meth:`expect` was told of it."""
        ready: Mapping[Drawing, Tensor] = {}
        if self._coming is not None and self._coming[0] == list(indices):
            ready = self._coming[1].result()
        self._coming = None
        return ImageDraws(self.seed, indices, ready)

    def expect(self, indices: Sequence[int], drawings: Iterable[Drawing]) -> None:
        """Start to make ``drawings`` for the images ``indices``."""
        wanted = tuple(drawings)

        def make() -> dict[Drawing, Tensor]:
            return {d: d.make(self.seed, indices, pinned=self.pinned) for d in wanted}

        self._coming = list(indices), self._thread.submit(make)
