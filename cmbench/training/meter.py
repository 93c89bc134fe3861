"""Means, counts and times of a logging interval; the check that numbers are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmbench.errors import NonFiniteError
from cmbench.plugin.method import Progress
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState

#: Steps of a compiled phase whose time is not that of training: compilation, then allocation.
WARM_UP_STEPS = 4


class Meter:
    """Means over a logging interval, kept on the device until it ends."""

    def __init__(self, state: TrainingState, settings: Settings) -> None:
        self.state, self.settings = state, settings
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bad_nimg: Tensor | None = None
        self._steps = 0
        self._warmed_phase = -1
        self._warm_up = self._owed = 0
        self.begin()

    def begin(self) -> None:
        """Start the clock again: what took time until now belongs to no step."""
        self._started = self._last = self._saved = time.perf_counter()

    def see_loss(self, loss: Tensor) -> None:
        """Log a loss; raise if it is not finite (see :meth:`_refuse`)."""
        self._add("loss", loss)
        self._refuse("loss", loss)

    def see_gradient(self, norm: Tensor, scale: Tensor | None = None) -> None:
        """Log the norm of a gradient; raise if it is not finite, as it can be for a finite loss."""
        self._add("grad_norm", norm.detach())
        self._refuse("gradient", norm.detach())
        if scale is not None:
            self._add("loss_scale", scale)

    def _refuse(self, what: str, value: Tensor) -> None:
        """Raise if ``value`` is not finite: at once on the CPU, at the interval's end on a GPU.

        Reading a value from a GPU at every step would stall it. The position of the first bad value
        is kept on the device until the interval ends; no checkpoint is written in between.
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
        self._see_seconds(now - self._last)
        self._last = now
        self._steps += 1

    def _see_seconds(self, seconds: float) -> None:
        """Add a step's time to its phase.

        The first steps of a compiled phase compile. Each of them counts as much as the first one
        after them, so that training hours do not contain compilation.
        """
        name, phase = self.state.phase.name, self.state.phase_index
        if phase != self._warmed_phase:
            self._warmed_phase, self._warm_up, self._owed = phase, WARM_UP_STEPS, 0
        if self.settings.compile and self._warm_up:
            self._warm_up, self._owed = self._warm_up - 1, self._owed + 1
            return
        seconds, self._owed = seconds * (1 + self._owed), 0
        self.state.seconds[name] = self.state.seconds.get(name, 0.0) + seconds

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def due(self) -> bool:
        """Return whether the logging interval is over."""
        return self._last - self._started >= self.settings.log_seconds

    def long_unsaved(self) -> bool:
        """Return whether the last checkpoint, or the start, was too long ago."""
        return self._last - self._saved >= self.settings.checkpoint_seconds

    def saved(self) -> None:
        """Note that a checkpoint has just been written."""
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
    """Return the error for a loss or gradient that is NaN or infinite."""
    return NonFiniteError(
        f"training phase {state.phase.name!r}",
        f"the {what} is not finite at {nimg} images seen",
        remedy="the last good checkpoint is kept; lower optimizer.lr or set optimizer.grad_clip",
    )
