"""Self-attention over the pixels of a feature map."""

from __future__ import annotations

from torch import Tensor, nn

from cmbench.networks import ops
from cmbench.networks.dual import Value
from cmbench.networks.layers import Conv2d, GroupNorm, Init


class SelfAttention(nn.Module):
    """Self-attention over pixels. Rows of ``qkv``: q, k, v, each by head, then channel."""

    def __init__(
        self, channels: int, *, heads: int, eps: float, init: Init, init_zero: Init
    ) -> None:
        super().__init__()
        self.heads = heads
        #: Products and softmax one by one: PyTorch's forward-mode AD has no other way.
        self.explicit = False
        self.norm = GroupNorm(channels, eps=eps)
        self.qkv = Conv2d(channels, 3 * channels, 1, init=init)
        self.proj = Conv2d(channels, channels, 1, init=init_zero)

    def forward(self, x: Value) -> Value:
        """Return the branch ``[N, C, H, W]`` (without the skip)."""
        n, c, height, width = x.shape

        def split(v: Tensor) -> Tensor:
            # [3, N, heads, tokens, channels]; a view where channels come last in memory.
            v = v.permute(0, 2, 3, 1).reshape(n, height * width, 3, self.heads, c // self.heads)
            return v.permute(2, 0, 3, 1, 4)

        def merge(v: Tensor) -> Tensor:
            return v.permute(0, 2, 1, 3).reshape(n, height, width, c).permute(0, 3, 1, 2)

        q, k, v = ops.unbind(ops.linear_map(split, self.qkv(self.norm(x))))
        y = ops.attention(q, k, v, explicit=self.explicit)
        return self.proj(ops.linear_map(merge, y))  # type: ignore[no-any-return]
