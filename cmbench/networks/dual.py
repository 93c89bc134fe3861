"""Carried tangents: a tensor and its directional derivative, moved through a network together.

A network body is written once over ``Value = Tensor | Dual``. On a :class:`Dual` every operation of
:mod:`cmbench.networks.ops` runs the *same* primal kernel as on a plain tensor (so the output is
bit-equal and carries the same autograd graph and dropout mask) and then pushes the tangent through
the operation's derivative under ``no_grad``.

Why not PyTorch's forward-mode AD: it multiplies every primal by a zero weight-tangent (three
applications per linear layer where two suffice), has no formula for fused attention, is dropped
silently in places by ``torch.compile``, and forces a second forward or keeps the tangents'
activations. Carried tangents cost one extra application per linear layer and no memory for the
backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Dual:
    """A tensor with a tangent of the same shape.

    ``primal`` carries the autograd graph, ``tangent`` never does. ``precision`` is the dtype in
    which tangents are propagated whatever autocast says; None lets them follow the primal.
    """

    primal: Tensor
    tangent: Tensor
    precision: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the primal (and of the tangent)."""
        return self.primal.shape

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the primal."""
        return self.primal.dtype

    @property
    def device(self) -> torch.device:
        """Device of the primal."""
        return self.primal.device


Value: TypeAlias = Tensor | Dual


def primal_of(value: Value) -> Tensor:
    """Return the tensor itself, without its tangent."""
    return value.primal if isinstance(value, Dual) else value


def make_dual(primal: Tensor, tangent: Tensor, precision: torch.dtype | None = None) -> Dual:
    """Pair a tensor with a tangent of the same shape; the tangent is detached.

    Raises ValueError if the shapes differ.
    """
    if primal.shape != tangent.shape:
        raise ValueError(
            f"tangent of shape {tuple(tangent.shape)} for a tensor of shape {tuple(primal.shape)}"
        )
    dtype = primal.dtype if precision is None else precision
    return Dual(primal, tangent.detach().to(dtype), precision)


def _flatten(dual: Dual) -> tuple[list[Tensor], torch.dtype | None]:
    return [dual.primal, dual.tangent], dual.precision


def _unflatten(leaves: Any, precision: Any) -> Dual:
    primal, tangent = leaves
    return Dual(primal, tangent, precision)


# FSDP's and DDP's hooks find the tensors inside a module's inputs and outputs through pytrees.
pytree.register_pytree_node(
    Dual, _flatten, _unflatten, serialized_type_name="cmbench.networks.Dual"
)
