"""Self-attention over the pixels of a feature map, and its derivative along a tangent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks import ops
from cmbench.networks.dual import Dual, Value, primal_of
from cmbench.networks.layers import Conv2d, Init


def head_count(channels: int, per_head: int) -> int:
    """Return how many heads of about ``per_head`` channels a block of ``channels`` has, at least 1.

    Raises UserError unless they share its channels evenly.
    """
    heads = max(channels // per_head, 1)
    if channels % heads:
        raise UserError(
            "network",
            f"channels_per_head {per_head} in a block of {channels} channels",
            allowed="a size that divides every width with attention",
            remedy="choose another channels_per_head or base width",
        )
    return heads


def split_heads(x: Value, heads: int) -> Value:
    """Map ``[N, 3C, H, W]``, rows q, k, v by head, to ``[3, N, heads, H W, C / heads]``."""

    def split(v: Tensor) -> Tensor:
        # A view where channels come last in memory.
        n, c, height, width = v.shape
        v = v.permute(0, 2, 3, 1).reshape(n, height * width, 3, heads, c // (3 * heads))
        return v.permute(2, 0, 3, 1, 4)

    return ops.linear_map(split, x)


def merge_heads(x: Value, shape: torch.Size) -> Value:
    """Map ``[N, heads, H W, C / heads]`` back to ``shape`` ``[N, C, H, W]``."""
    n, c, height, width = shape

    def merge(v: Tensor) -> Tensor:
        return v.permute(0, 2, 1, 3).reshape(n, height, width, c).permute(0, 3, 1, 2)

    return ops.linear_map(merge, x)


def attention(q: Value, k: Value, v: Value, *, explicit: bool = False) -> Value:
    """Softmax attention over ``[N, heads, tokens, channels]``, scaled by ``channels ** -0.5``.

    The primal uses PyTorch's fused kernel, or the explicit product-softmax-product where
    ``explicit`` is set (needed by forward-mode AD, whose formulas the fused kernels lack). The
    tangent is explicit, chunked over images and queries so that its memory stays bounded (on the
    CPU, within the cache).
    """
    attend = explicit_attention if explicit else F.scaled_dot_product_attention
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


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return :func:`attention` ``[N, heads, tokens, channels]`` by two products and a softmax."""
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
        d_weights: Tensor = torch.ops.aten._softmax_backward_data(d_scores, weights, -1, wide)
        dy = d_weights.to(dtype) @ vp
        return dy.add_(weights.to(dtype) @ v.tangent.to(dtype))


class AttentionBase(nn.Module):
    """Attention with a choice of primal kernel."""

    #: Products and softmax one by one: PyTorch's forward-mode AD has no other way.
    explicit: bool = False


class SelfAttention(AttentionBase):
    """Self-attention over pixels. Rows of ``qkv``: q, k, v, each by head, then channel."""

    def __init__(
        self, channels: int, *, heads: int, norm: nn.Module, init: Init, init_zero: Init
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm
        self.qkv = Conv2d(channels, 3 * channels, 1, init=init)
        self.proj = Conv2d(channels, channels, 1, init=init_zero)

    def forward(self, x: Value) -> Value:
        """Return the branch ``[N, C, H, W]`` (without the skip)."""
        qkv = split_heads(self.qkv(self.norm(x)), self.heads)
        y = attention(*ops.unbind(qkv), explicit=self.explicit)
        return self.proj(merge_heads(y, x.shape))  # type: ignore[no-any-return]
