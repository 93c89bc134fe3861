"""Loss scaling for fp16: small gradients would vanish in it, large ones overflow.

The scaler is torch's (``torch.amp.GradScaler``): the loss is multiplied by a scale before backward,
gradients are divided by it in float32; a step whose gradients are not finite is skipped and the
scale halved, and it doubles after 2000 good steps in a row. bfloat16 has float32's exponents and
needs none of this. Nothing here asks the device for a number, except that an optimizer without a
fused kernel (RAdam) must know on the host whether to step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Below this a gradient that is not finite is not the scale's fault.
SMALLEST_SCALE = 1.0


class LossScaler:
    """One optimizer's scale; without ``enabled`` everything passes through untouched.

    ``several``: each process has only its slices of the gradients, and all skip a step together.
    """

    def __init__(
        self,
        device: torch.device,
        enabled: bool,
        saved: Mapping[str, Any] | None = None,
        *,
        several: bool = False,
    ) -> None:
        kind = _SharedScaler if several else torch.amp.GradScaler
        self._scaler = kind(device.type) if enabled else None
        if self._scaler is not None and saved:
            self._scaler.load_state_dict(dict(saved))

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to call ``backward`` on."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients, summed over processes, by the scale."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def blameless(self, norm: Tensor) -> Tensor:
        """Return a gradient norm, zero where it is not finite and the scale can still fall."""
        if self._scaler is None:
            return norm
        scale = self._scaler._get_scale_async()
        assert scale is not None
        overflowed = ~torch.isfinite(norm) & (scale.to(norm.device) > SMALLEST_SCALE)
        return torch.where(overflowed, torch.zeros_like(norm), norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step, or not if a gradient is not finite; then adapt the scale."""
        if self._scaler is None:
            optimizer.step()
            return
        self._scaler.step(optimizer)
        self._scaler.update()

    def scale(self) -> Tensor | None:
        """Return the scale, a tensor on the device; None without scaling."""
        if self._scaler is None:
            return None
        found = self._scaler._get_scale_async()
        return None if found is None else found.detach().clone()

    def state(self) -> dict[str, Any]:
        """Return plain numbers for a checkpoint (waits for the device); empty without scaling."""
        return {} if self._scaler is None else dict(self._scaler.state_dict())


class _SharedScaler(torch.amp.GradScaler):
    """Skips a step in every process if the gradients are not finite in one.

    ``ShardedGradScaler`` of FSDP does the same, but finds in the shape ``[1]``, which fused
    optimizers refuse.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for bad in found.values():
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)


def scaler_states(scalers: Sequence[LossScaler]) -> list[dict[str, Any]]:
    """Return the states of scalers that scale, or nothing."""
    states = [scaler.state() for scaler in scalers]
    return states if any(states) else []
