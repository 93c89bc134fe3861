"""Loss scaling for fp16: small gradients would vanish in it, large ones overflow.

The scaler is torch's (``torch.amp.GradScaler``): the loss is multiplied by a scale before backward,
gradients are divided by it in float32; a step whose gradients are not finite is skipped and the
scale halved, and it doubles after 2000 good steps in a row. bfloat16 has float32's exponents and
needs none of this. Nothing here asks the device for a number, except that an optimizer without a
fused kernel (RAdam) must know on the host whether to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Below this a gradient that is not finite is not the scale's fault.
SMALLEST_SCALE = 1.0


class LossScaler(torch.amp.GradScaler):
    """torch's scaler of one optimizer; without ``enabled`` everything passes through untouched.

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
        super().__init__(device.type, enabled=enabled)
        self._several = several
        if self.is_enabled() and saved:
            self.load_state_dict(dict(saved))

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients, summed over processes, by the scale.

        ``ShardedGradScaler`` of FSDP shares what overflowed too, but in the shape ``[1]``, which
        fused optimizers refuse.
        """
        super().unscale_(optimizer)
        if self.is_enabled() and self._several:
            for bad in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                dist.all_reduce(bad, op=dist.ReduceOp.MAX)

    def step(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Step, or not if a gradient is not finite; then adapt the scale."""
        super().step(optimizer)
        self.update()

    def blameless(self, norm: Tensor) -> Tensor:
        """Return a gradient norm, zero where it is not finite and the scale can still fall."""
        scale = self.current()
        if scale is None:
            return norm
        overflowed = ~torch.isfinite(norm) & (scale.to(norm.device) > SMALLEST_SCALE)
        return torch.where(overflowed, torch.zeros_like(norm), norm)

    def current(self) -> Tensor | None:
        """Return the scale, a tensor on the device; None without scaling."""
        found = self._get_scale_async() if self.is_enabled() else None
        return None if found is None else found.detach().clone()
