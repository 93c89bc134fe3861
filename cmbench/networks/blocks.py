"""The residual U-Net block that DDPM++, NCSN++, ADM and the tiny network share.

Own implementation of the block family described in Song et al. 2021 (arXiv:2011.13456, App. H),
Dhariwal & Nichol 2021 (arXiv:2105.05233) and unified in Karras et al. 2022 (arXiv:2206.00364,
App. F.2 and Table 7), with sCM's adaptive double normalisation (arXiv:2410.11081, Sec. 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmbench.networks import ops
from cmbench.networks.attention import SelfAttention, head_count
from cmbench.networks.config import Conditioning
from cmbench.networks.dual import Dual, Value
from cmbench.networks.layers import Conv2d, GroupNorm, Init, Linear, Resample, ResampleMode
from cmbench.networks.temporal import temporal_mixing

#: eps of pnorm in sCM's double normalisation.
_PNORM_EPS = 1e-5


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one network have in common.

    ``conditioning``: ``additive`` adds the embedding before the second norm (DDPM++);
    ``scale-shift`` computes ``norm(h) * (1 + s) + b`` (ADM's AdaGN); ``double`` computes
    ``norm(h) * pnorm(s) + pnorm(b)`` (sCM).
    ``states`` and ``temporal_modes`` are the network config's.
    """

    embedding_dim: int
    conditioning: Conditioning = "additive"
    skip_scale: float = 1.0
    eps: float = 1e-5
    min_group_channels: int = 4
    taps: tuple[float, ...] = (1, 1)
    resample_projection: bool = False
    channels_per_head: int | None = None
    init: Init = field(default_factory=Init)
    init_zero: Init = field(default_factory=lambda: Init(gain=0.0))
    init_attention: Init = field(default_factory=Init)
    states: int = 1
    temporal_modes: int = 2

    def norm(self, channels: int) -> GroupNorm:
        """Return a group normalisation of that many channels."""
        return GroupNorm(channels, min_channels=self.min_group_channels, eps=self.eps)


class Modulation(nn.Module):
    """Let the embedding act on a block's hidden state: norm and modulation in one."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.conditioning = style.conditioning
        self.norm = style.norm(channels)
        outputs = channels if style.conditioning == "additive" else 2 * channels
        self.affine = Linear(style.embedding_dim, outputs, init=style.init)

    def forward(self, h: Value, emb: Value) -> Value:
        """Return the normalised, modulated ``[N, C, H, W]`` for an embedding ``[N, E]``."""
        params = self.affine(emb)
        if self.conditioning == "additive":
            return self.norm(ops.add(h, ops.linear_map(lambda p: p[:, :, None, None], params)))  # type: ignore[no-any-return]
        factor, shift = ops.halves(params)
        if self.conditioning == "double":
            factor, shift = ops.pixel_norm(factor, _PNORM_EPS), ops.pixel_norm(shift, _PNORM_EPS)
        else:
            factor = ops.add_constant(factor, 1.0)
        return ops.scale_shift(self.norm(h), factor, shift)


class UNetBlock(nn.Module):
    """norm, SiLU, conv (resampled), modulation, SiLU, dropout, conv, skip; then attention.

    Last, where a network has several states, their mixing.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: BlockStyle,
        *,
        dropout: float = 0.0,
        resample: ResampleMode = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.style, self.dropout = style, dropout
        self.norm0 = style.norm(inputs)
        self.conv0 = Conv2d(inputs, outputs, 3, resample=resample, taps=style.taps, init=style.init)
        self.modulation = Modulation(outputs, style)
        self.conv1 = Conv2d(outputs, outputs, 3, init=style.init_zero)
        self.skip = self._make_skip(inputs, outputs, resample)
        self.attention = self._make_attention(outputs) if attention else None
        self.temporal = temporal_mixing(style, outputs)

    def _make_attention(self, channels: int) -> SelfAttention:
        style = self.style
        return SelfAttention(
            channels,
            heads=head_count(channels, style.channels_per_head or channels),
            norm=style.norm(channels),
            init=style.init_attention,
            init_zero=style.init_zero,
        )

    def _make_skip(self, inputs: int, outputs: int, resample: ResampleMode) -> nn.Module | None:
        style = self.style
        if inputs != outputs or (resample != "keep" and style.resample_projection):
            return Conv2d(inputs, outputs, 1, resample=resample, taps=style.taps, init=style.init)
        return None if resample == "keep" else Resample(resample, style.taps)

    def forward(self, x: Value, emb: Value) -> Value:
        """Map ``[N, inputs, H, W]`` and the embedding ``[N, E]`` to ``[N, outputs, H', W']``."""
        style = self.style
        h = self.conv0(ops.silu(self.norm0(x)))
        h = ops.silu(self.modulation(h, emb))
        h = self.conv1(ops.dropout(h, self.dropout, self.training))
        skip = x if self.skip is None else self.skip(x)
        y = ops.residual(skip, h, style.skip_scale)
        if self.attention is not None:
            y = ops.residual(y, self.attention(y), style.skip_scale)
        return y if self.temporal is None else self.temporal(y)


def run_block(
    block: Callable[[Value, Value], Value], x: Value, emb: Value, *, checkpointing: bool
) -> Value:
    """Run a block, keeping no activations inside it where ``checkpointing`` is set.

    Only the primal is recomputed in the backward pass: tangents need no gradient.
    """
    if not (checkpointing and torch.is_grad_enabled()):
        return block(x, emb)
    if torch.compiler.is_compiling() or not isinstance(x, Dual) or not isinstance(emb, Dual):
        # The compiler drops the tangents from the recomputation by itself.
        y: Value = checkpoint(block, x, emb, use_reentrant=False)
        return y
    tangent: list[Tensor] = []

    def primal(px: Tensor, pemb: Tensor) -> Tensor:
        if tangent:
            again = block(px, pemb)
            assert isinstance(again, Tensor)
            return again
        first = block(Dual(px, x.tangent, x.precision), Dual(pemb, emb.tangent, emb.precision))
        assert isinstance(first, Dual)
        tangent.append(first.tangent)
        return first.primal

    y = checkpoint(primal, x.primal, emb.primal, use_reentrant=False)
    return Dual(y, tangent[0], x.precision)


class Stage(nn.ModuleList):
    """Blocks in a row."""

    def forward(self, h: Value, emb: Value, *, checkpointing: bool = False) -> Value:
        """Run them, with or without keeping activations inside a block."""
        for block in self:
            h = run_block(block, h, emb, checkpointing=checkpointing)
        return h
