"""Directional derivatives of any network: carried tangents, forward-mode AD, finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmbench.errors import UserError

TangentMode = Literal["carried", "forward-ad", "finite-difference"]
TANGENT_MODES: tuple[TangentMode, ...] = ("carried", "forward-ad", "finite-difference")


_OPTIONS = ("conditions", "condition_tangents", "tangent_dtype")


class NetworkCall(Protocol):
    """What a third-party network must accept: the arguments of ``Network.forward``.

    ``conditions`` only if it is used with further scalars.
    """

    def __call__(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Return F ``[N, C, H, W]``."""
        ...


def default_mode(network: NetworkCall) -> TangentMode:
    """Return ``carried`` for a network that carries tangents, else ``forward-ad``."""
    return "carried" if hasattr(_unwrap(network), "forward_with_tangent") else "forward-ad"


def tangent_of(
    network: NetworkCall,
    x: Tensor,
    c_noise: Tensor,
    dx: Tensor,
    dc_noise: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
    *,
    conditions: Mapping[str, Tensor] | None = None,
    condition_tangents: Mapping[str, Tensor] | None = None,
    mode: TangentMode | None = None,
    step: float = 1e-2,
    tangent_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(F, dF)`` ``[N, C, H, W]``: F graded, bit-equal to a plain call; dF detached.

    ``mode`` None takes the network's own carried tangents where it has them. ``forward-ad`` runs
    ``torch.func.jvp`` without gradients beside the graded call, ``finite-difference`` two further
    calls at ``± step`` along the tangent (a float32 fallback: in bfloat16 its error exceeds 30% at
    any step). ``conditions`` ``[N]`` by name are moved by ``condition_tangents``, those without one
    not at all. Both restore the random state, so that all calls draw the same dropout masks.
    """
    mode = mode or default_mode(network)
    if mode == "carried":
        given = (conditions, condition_tangents, tangent_dtype)
        options = {k: v for k, v in zip(_OPTIONS, given, strict=True) if v is not None}
        return _carried(network, x, c_noise, dx, dc_noise, labels, augment_labels, options)
    moving = condition_tangents or {}
    names = [name for name in conditions or {} if name in moving]

    def call(x_in: Tensor, c_in: Tensor, *moved: Tensor) -> Tensor:
        now = {**(conditions or {}), **dict(zip(names, moved, strict=True))}
        given = {"conditions": now} if now else {}
        return network(x_in, c_in, labels=labels, augment_labels=augment_labels, **given)

    point = (x, c_noise, *((conditions or {})[name] for name in names))
    direction = (dx, dc_noise, *(moving[name] for name in names))
    if mode == "forward-ad":
        return _forward_ad(call, point, direction)
    if mode == "finite-difference":
        return _finite_difference(call, point, direction, step)
    raise UserError(
        "tangent",
        f"unknown mode {mode!r}",
        allowed=", ".join(TANGENT_MODES),
        remedy="set one of these",
    )


def _unwrap(network: Any) -> Any:
    """Return the module inside DDP or ``torch.compile`` wrappers."""
    while isinstance(network, nn.Module):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            break
        network = inner
    return network


def _carried(
    network: Any,
    x: Tensor,
    c_noise: Tensor,
    dx: Tensor,
    dc_noise: Tensor,
    labels: Tensor | None,
    augment_labels: Tensor | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    inner = _unwrap(network)
    if not hasattr(inner, "forward_with_tangent"):
        raise UserError(
            "tangent",
            f"network {type(inner).__name__} has no forward_with_tangent",
            allowed="forward-ad, finite-difference",
            remedy="set the tangent mode to one of these",
        )
    if inner is network:
        y, dy = inner.forward_with_tangent(
            x, c_noise, dx, dc_noise, labels, augment_labels, **options
        )
    else:
        # Wrappers know only forward; going around them would skip DDP's gradient synchronisation.
        tangents = (dx, dc_noise)
        y, dy = network(x, c_noise, labels, augment_labels, tangents=tangents, **options)
    return y, dy


class _SharedRandomness:
    """Give every call the random state that the first one started from."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else None

    def rewind(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _forward_ad(
    call: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    randomness = _SharedRandomness(point[0])
    # No fused attention kernel has a forward-mode formula.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dy: Tensor = torch.func.jvp(call, point, direction)[1]
    randomness.rewind()
    return call(*point), dy.detach()


def _finite_difference(
    call: Callable[..., Tensor],
    point: tuple[Tensor, ...],
    direction: tuple[Tensor, ...],
    step: float,
) -> tuple[Tensor, Tensor]:
    randomness = _SharedRandomness(point[0])
    sides = []
    with torch.no_grad():
        for h in (step, -step):
            moved = [p + h * d for p, d in zip(point, direction, strict=True)]
            sides.append(call(*moved).double())
            randomness.rewind()
    dy = ((sides[0] - sides[1]) / (2.0 * step)).to(point[0].dtype)
    return call(*point), dy
