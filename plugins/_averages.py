"""Networks that follow another one: targets and self-teachers."""

from __future__ import annotations

import torch
from torch import nn


def move_towards(follower: nn.Module, leader: nn.Module, share: float) -> None:
    """Move the weights of ``follower`` by ``share`` of the way to those of ``leader``."""
    torch._foreach_lerp_(list(follower.parameters()), list(leader.parameters()), share)
