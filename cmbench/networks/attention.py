"""Self-attention over the pixels of a feature map."""

from __future__ import annotations

from torch import nn

from cmbench.errors import UserError
from cmbench.networks import ops
from cmbench.networks.dual import Value
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
        qkv = ops.split_heads(self.qkv(self.norm(x)), self.heads)
        y = ops.attention(*ops.unbind(qkv), explicit=self.explicit)
        return self.proj(ops.merge_heads(y, x.shape))  # type: ignore[no-any-return]
