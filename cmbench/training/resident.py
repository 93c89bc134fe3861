"""Small tables that every step needs, kept on the device: a copy from the host waits for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def resident(
    make: Callable[..., Tensor], *arguments: Any, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``make(*arguments)`` on the device of ``like``, made once for that device.

    Args:
        make: a pure function (or bound method) that returns a tensor on the CPU.
        arguments: hashable.
        like: gives the device.
        dtype: of the result; None keeps what ``make`` returns.
    """
    if like.device.type == "cpu":
        return make(*arguments).to(dtype=dtype)
    return _kept(make, arguments, like.device, dtype)


@lru_cache(maxsize=256)
def _kept(
    make: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Tensor:
    with torch.device("cpu"):
        made = make(*arguments).to(dtype=dtype)
    # From page-locked memory a copy need not wait: grids of a curriculum change as it goes on.
    return made.pin_memory().to(device, non_blocking=True)
