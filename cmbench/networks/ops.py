"""Operations on a plain tensor or on a :class:`~cmbench.networks.dual.Dual`.

Elementwise operations keep the shape (``add`` and ``mul`` broadcast); features ``[N, C, ...]``.

Each function runs the primal kernel first, exactly as without a tangent, and the derivative under
``no_grad`` after it (primal first also matters under autocast, whose weight cache must be filled
with the casts that carry gradients).

Several derivatives reuse a *backward* kernel of PyTorch: where the Jacobian is symmetric (softmax,
normalisation without affine part) or diagonal (SiLU), the vector-Jacobian product that backward
computes is the Jacobian-vector product too, in one fused pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmbench.networks.dual import Dual, Value, primal_of

#: A map that is linear in its first argument: ``(x, weight, bias or None) -> y``.
WeightedMap = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten


# --- linear operations ---------------------------------------------------------------------------


def linear_map(fn: Callable[[Tensor], Tensor], x: Value) -> Value:
    """Apply a map without parameters that is linear in ``x`` (reshape, pooling, resampling…)."""
    if not isinstance(x, Dual):
        return fn(x)
    y = fn(x.primal)
    with torch.no_grad():
        return Dual(y, fn(x.tangent), x.precision)


def weighted_map(fn: WeightedMap, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """Apply ``fn(x, weight, bias)``, linear in ``x`` up to the bias.

    The tangent needs one further application, without the bias.
    """
    if not isinstance(x, Dual):
        return fn(x, weight, bias)
    y = fn(x.primal, weight, bias)
    with torch.no_grad():
        if x.precision is None:
            return Dual(y, fn(x.tangent, weight, None))
        with torch.autocast(x.tangent.device.type, enabled=False):
            dy = fn(x.tangent.to(x.precision), weight.to(x.precision), None)
        return Dual(y, dy, x.precision)


def linear(x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """Return ``x @ weight.T + bias`` over the last axis."""
    return weighted_map(F.linear, x, weight, bias)


def add(a: Value, b: Value) -> Value:
    """Return ``a + b`` (broadcasting; tangents add up)."""
    primal = primal_of(a) + primal_of(b)
    if isinstance(a, Dual) and isinstance(b, Dual):
        with torch.no_grad():
            return Dual(primal, a.tangent + b.tangent, a.precision)
    for dual in (a, b):
        if isinstance(dual, Dual):
            return Dual(primal, dual.tangent.expand(primal.shape), dual.precision)
    return primal


def scale(x: Value, factor: float) -> Value:
    """Return ``factor * x`` for a number."""
    return linear_map(lambda v: v * factor, x)


def mul(a: Value, b: Value) -> Value:
    """Return the elementwise product (product rule)."""
    primal = primal_of(a) * primal_of(b)
    if isinstance(a, Dual) and isinstance(b, Dual):
        with torch.no_grad():
            dy = _cast(b.primal, a.tangent) * a.tangent
            return Dual(primal, dy + _cast(a.primal, b.tangent) * b.tangent, a.precision)
    if isinstance(a, Dual):
        with torch.no_grad():
            return Dual(primal, a.tangent * _cast(primal_of(b), a.tangent), a.precision)
    if isinstance(b, Dual):
        with torch.no_grad():
            return Dual(primal, b.tangent * _cast(a, b.tangent), b.precision)
    return primal


def cat(values: Sequence[Value], dim: int = 1) -> Value:
    """Concatenate; a plain tensor among duals has zero tangent."""
    primal = torch.cat([primal_of(v) for v in values], dim)
    duals = [v for v in values if isinstance(v, Dual)]
    if not duals:
        return primal
    first = duals[0]
    with torch.no_grad():
        tangents = [
            v.tangent if isinstance(v, Dual) else torch.zeros_like(v, dtype=first.tangent.dtype)
            for v in values
        ]
        return Dual(primal, torch.cat(tangents, dim), first.precision)


def halves(x: Value) -> tuple[Value, Value]:
    """Split axis 1 in the middle."""
    half = x.shape[1] // 2
    return linear_map(lambda v: v[:, :half], x), linear_map(lambda v: v[:, half:], x)


def unbind(x: Value) -> tuple[Value, ...]:
    """Split along axis 0 into values without that axis."""
    if not isinstance(x, Dual):
        return x.unbind(0)
    return tuple(Dual(p, t, x.precision) for p, t in zip(x.primal.unbind(0), x.tangent.unbind(0)))


def add_constant(x: Value, constant: float) -> Value:
    """Return ``x + constant`` for a number."""
    if not isinstance(x, Dual):
        return x + constant
    return Dual(x.primal + constant, x.tangent, x.precision)


def blend(a: Value, b: Value, weight_a: float, weight_b: float) -> Value:
    """Return ``weight_a * a + weight_b * b`` for numbers."""
    primal = torch.add(primal_of(a) * weight_a, primal_of(b), alpha=weight_b)
    if isinstance(a, Dual) and isinstance(b, Dual):
        with torch.no_grad():
            dy = (a.tangent * weight_a).add_(b.tangent, alpha=weight_b)
            return Dual(primal, dy, a.precision)
    if isinstance(a, Dual):
        return Dual(primal, (a.tangent * weight_a).expand(primal.shape), a.precision)
    if isinstance(b, Dual):
        return Dual(primal, (b.tangent * weight_b).expand(primal.shape), b.precision)
    return primal


def residual(skip: Value, branch: Value, factor: float) -> Value:
    """Return ``(skip + branch) * factor``."""
    y = add(skip, branch)
    return y if factor == 1.0 else scale(y, factor)


# --- elementwise ---------------------------------------------------------------------------------


def _cast(value: Tensor, like: Tensor) -> Tensor:
    return value if value.dtype == like.dtype else value.to(like.dtype)


def silu(x: Value) -> Value:
    """Return ``x * sigmoid(x)``."""
    if not isinstance(x, Dual):
        return F.silu(x)
    y = F.silu(x.primal)
    with torch.no_grad():
        # Diagonal Jacobian: the backward kernel is the derivative, in one pass.
        dy = _aten.silu_backward(x.tangent, _cast(x.primal, x.tangent))
    return Dual(y, dy, x.precision)


def leaky_relu(x: Value, slope: float) -> Value:
    """Return ``x`` where it is positive, ``slope * x`` elsewhere."""
    if not isinstance(x, Dual):
        return F.leaky_relu(x, slope)
    y = F.leaky_relu(x.primal, slope)
    with torch.no_grad():
        dy = _aten.leaky_relu_backward(x.tangent, _cast(x.primal, x.tangent), slope, False)
    return Dual(y, dy, x.precision)


def clip(x: Value, limit: float) -> Value:
    """Clip to ``[-limit, limit]``; the derivative is 0 where clipped."""
    if not isinstance(x, Dual):
        return x.clamp(-limit, limit)
    y = x.primal.clamp(-limit, limit)
    with torch.no_grad():
        dy = _aten.hardtanh_backward(x.tangent, _cast(x.primal, x.tangent), -limit, limit)
    return Dual(y, dy, x.precision)


def cos_sin(angle: Value, dim: int = -1) -> Value:
    """Return ``cat([cos(angle), sin(angle)])``."""
    if not isinstance(angle, Dual):
        return torch.cat([angle.cos(), angle.sin()], dim)
    c, s = angle.primal.cos(), angle.primal.sin()
    with torch.no_grad():
        dy = torch.cat([-s * angle.tangent, c * angle.tangent], dim)
    return Dual(torch.cat([c, s], dim), dy, angle.precision)


def cos(angle: Value) -> Value:
    """Return the cosine."""
    if not isinstance(angle, Dual):
        return angle.cos()
    y = angle.primal.cos()
    with torch.no_grad():
        return Dual(y, -angle.primal.sin() * angle.tangent, angle.precision)


def dropout(x: Value, p: float, training: bool) -> Value:
    """Zero elements with probability ``p`` and rescale; primal and tangent share the mask."""
    if not training or p == 0.0:
        return x
    # native_dropout on every path, so that a joint pass draws the mask of a plain one.
    y, mask = torch.native_dropout(primal_of(x), p, True)
    if not isinstance(x, Dual):
        return y
    with torch.no_grad():
        dy = x.tangent * mask
        return Dual(y, dy.mul_(1.0 / (1.0 - p)), x.precision)


def scale_shift(x: Value, factor: Value, shift: Value) -> Value:
    """Return ``x * factor + shift``, factor and shift ``[N, C]`` broadcast over pixels."""
    f, b = (linear_map(lambda v: v[:, :, None, None], v) for v in (factor, shift))
    dtype = x.dtype
    primal = torch.addcmul(primal_of(b).to(dtype), primal_of(x), primal_of(f).to(dtype))
    if not isinstance(x, Dual):
        return primal
    with torch.no_grad():
        wide = x.tangent.dtype
        if isinstance(b, Dual):
            dy = torch.addcmul(b.tangent.to(wide), x.tangent, primal_of(f).to(wide))
        else:
            dy = x.tangent * primal_of(f).to(wide)
        if isinstance(f, Dual):
            dy.addcmul_(x.primal.to(wide), f.tangent.to(wide))
    return Dual(primal, dy, x.precision)


# --- normalisation -------------------------------------------------------------------------------


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised tensor, mean and reciprocal deviation ``[N, groups]``.

    Statistics are accumulated in at least float32 by the kernel and the result keeps ``x``'s dtype:
    going past autocast, which would return float32 and double the traffic.
    """
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    n, c = x.shape[:2]
    layout = torch.contiguous_format
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    pixels = x.numel() // (n * c)
    y, mean, rstd = torch.native_group_norm(
        x.contiguous(memory_format=layout), weight, bias, n, c, pixels, groups, eps
    )
    # The kernel keeps the layout; a compiler may believe otherwise (torch 2.14's fake tensors do).
    return y.contiguous(memory_format=layout), mean, rstd


def group_norm(
    x: Value,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    """Normalise over groups of channels and all pixels, ``x`` ``[N, C, ...]``.

    The Jacobian of the normalisation, ``rstd * (I - 1 1ᵀ/m - x̂ x̂ᵀ/m)``, is symmetric, so the
    backward kernel without affine weights gives the derivative.
    """
    if not isinstance(x, Dual):
        return _group_norm(x, groups, weight, bias, eps)[0]
    y, mean, rstd = _group_norm(x.primal, groups, weight, bias, eps)
    with torch.no_grad():
        return Dual(y, _group_norm_tangent(x, groups, weight, eps, mean, rstd), x.precision)


def _group_norm_tangent(
    x: Dual, groups: int, weight: Tensor | None, eps: float, mean: Tensor, rstd: Tensor
) -> Tensor:
    dx, primal = x.tangent, x.primal.detach()
    if primal.dtype in _HALF:
        # The kernel stores half-precision statistics; the derivative wants better ones.
        dx, primal = dx.float(), primal.float()
        _, mean, rstd = _group_norm(primal, groups, None, None, eps)
    else:
        mean, rstd = mean.detach().to(dx.dtype), rstd.detach().to(dx.dtype)
        primal = _cast(primal, dx)
    n, c = primal.shape[:2]
    layout = torch.contiguous_format
    if primal.device.type == "cpu" and primal.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    dy: Tensor = _aten.native_group_norm_backward(
        dx.contiguous(memory_format=layout),
        primal.contiguous(memory_format=layout),
        mean,
        rstd,
        None,
        n,
        c,
        primal.numel() // (n * c),
        groups,
        [True, False, False],
    )[0]
    if weight is not None:
        dy.mul_(weight.to(dy.dtype).view(1, c, *[1] * (dy.ndim - 2)))
    return dy.to(x.tangent.dtype)


def pixel_norm(x: Value, eps: float) -> Value:
    """Return ``x / sqrt(mean_channels(x²) + eps)`` over axis 1."""
    p = primal_of(x)
    r = (p.square().mean(1, keepdim=True) + eps).rsqrt()
    y = p * r
    if not isinstance(x, Dual):
        return y
    with torch.no_grad():
        dx = x.tangent
        r = r.to(dx.dtype)
        v = y.to(dx.dtype)
        return Dual(y, r * (dx - v * (v * dx).mean(1, keepdim=True)), x.precision)


def normalize(x: Value, dim: int, eps: float) -> Value:
    """Return ``x / (eps + sqrt(mean(x²)))`` over one axis, statistics in at least float32."""
    p = primal_of(x)
    wide = torch.promote_types(p.dtype, torch.float32)
    rms = torch.linalg.vector_norm(p, dim=dim, keepdim=True, dtype=wide) * p.shape[dim] ** -0.5
    norm = rms + eps
    y: Tensor = p / norm.to(p.dtype)
    if not isinstance(x, Dual):
        return y
    with torch.no_grad():
        dx = x.tangent
        v = y.to(dx.dtype)
        ratio = (norm / rms.clamp_min(torch.finfo(wide).tiny)).to(dx.dtype)
        along = (v * dx).mean(dim, keepdim=True) * ratio
        return Dual(y, (dx - v * along).div_(norm.to(dx.dtype)), x.precision)
