"""Operations on a plain tensor or on a :class:`~cmbench.networks.dual.Dual`.

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


# --- attention -----------------------------------------------------------------------------------


def split_heads(x: Value, heads: int) -> Value:
    """Map ``[N, 3C, H, W]``, rows q, k, v by head, to ``[3, N, heads, H W, C / heads]``."""

    def split(v: Tensor) -> Tensor:
        # A view where channels come last in memory.
        n, c, height, width = v.shape
        v = v.permute(0, 2, 3, 1).reshape(n, height * width, 3, heads, c // (3 * heads))
        return v.permute(2, 0, 3, 1, 4)

    return linear_map(split, x)


def merge_heads(x: Value, shape: torch.Size) -> Value:
    """Map ``[N, heads, H W, C / heads]`` back to ``shape`` ``[N, C, H, W]``."""
    n, c, height, width = shape

    def merge(v: Tensor) -> Tensor:
        return v.permute(0, 2, 1, 3).reshape(n, height, width, c).permute(0, 3, 1, 2)

    return linear_map(merge, x)


def attention(q: Value, k: Value, v: Value, *, explicit: bool = False) -> Value:
    """Softmax attention over ``[N, heads, tokens, channels]``, scaled by ``channels ** -0.5``.

    The primal uses PyTorch's fused kernel, or the explicit product-softmax-product where
    ``explicit`` is set (needed by forward-mode AD, whose formulas the fused kernels lack). The
    tangent is explicit, chunked over images and queries so that its memory stays bounded (on the
    CPU, within the cache).
    """
    attend = _explicit_attention if explicit else F.scaled_dot_product_attention
    y: Tensor = attend(primal_of(q), primal_of(k), primal_of(v))
    if not (isinstance(q, Dual) and isinstance(k, Dual) and isinstance(v, Dual)):
        return y
    with torch.no_grad():
        images, queries = _chunk(q.shape, k.shape[2], q.device)
        rows = []
        for i in range(0, q.shape[0], images):
            here = slice(i, i + images)
            ki, vi = (Dual(d.primal[here], d.tangent[here]) for d in (k, v))
            parts = [
                _attention_tangent(qi, dqi, ki, vi)
                for qi, dqi in zip(
                    torch.split(q.primal[here], queries, 2),
                    torch.split(q.tangent[here], queries, 2),
                )
            ]
            rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
        return Dual(y, rows[0] if len(rows) == 1 else torch.cat(rows), q.precision)


#: Queries of a chunk where memory is what counts.
_QUERY_CHUNK = 1024
#: Attention weights of a chunk on the CPU: 1 MB in float32, so that the four passes over them stay
#: in the cache (about a third faster at 1024 tokens than all at once).
_CACHED_WEIGHTS = 2**18


def _chunk(shape: torch.Size, keys: int, device: torch.device) -> tuple[int, int]:
    """Return the images and the queries whose tangents are computed at a time."""
    n, heads, queries, _ = shape
    if device.type != "cpu" or torch.compiler.is_compiling():  # a compiler would unroll the loops
        return n, _QUERY_CHUNK
    images = max(_CACHED_WEIGHTS // (heads * queries * keys), 1)
    return images, min(queries, max(_CACHED_WEIGHTS // (heads * keys), 1))


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, -1, dtype=wide).to(v.dtype) @ v


def _attention_tangent(q: Tensor, dq: Tensor, k: Dual, v: Dual) -> Tensor:
    """Return d(softmax(q kᵀ) v) for a chunk of queries.

    With P the attention weights: dP = P ∘ (dS - rowsum(P ∘ dS)), dO = dP v + P dv. Concatenating
    along the inner axis makes one product of each pair.
    """
    dtype, factor = dq.dtype, q.shape[-1] ** -0.5
    q, kp, vp = q.to(dtype) * factor, k.primal.to(dtype), v.primal.to(dtype)
    with torch.autocast(dq.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        weights = torch.softmax(q @ kp.transpose(-1, -2), -1, dtype=wide)
        pair_k = torch.cat([kp, k.tangent.to(dtype)], -1).transpose(-1, -2)
        d_scores = (torch.cat([dq * factor, q], -1) @ pair_k).to(wide)
        # The softmax Jacobian is symmetric too.
        d_weights: Tensor = _aten._softmax_backward_data(d_scores, weights, -1, wide)
        dy = d_weights.to(dtype) @ vp
        return dy.add_(weights.to(dtype) @ v.tangent.to(dtype))
