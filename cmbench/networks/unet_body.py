"""The encoder-decoder skeleton that DDPM++, NCSN++, ADM and EDM2 share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch import Tensor, nn

from cmbench.networks import ops
from cmbench.networks.base import Network
from cmbench.networks.blocks import BlockStyle, Stage, UNetBlock, run_block
from cmbench.networks.dual import Value
from cmbench.networks.layers import ResampleMode, favour_layout

Half = Literal["encoder", "decoder"]


class BlockFactory(Protocol):
    """Make the block of one place in the network; ``side`` is its output resolution in pixels."""

    def __call__(
        self,
        inputs: int,
        outputs: int,
        *,
        side: int,
        part: Half,
        resample: ResampleMode = "keep",
        attention: bool = False,
    ) -> nn.Module:
        """Return a module ``(x, emb) -> y``."""
        ...


def styled_blocks(style: BlockStyle, dropout_at: Callable[[int], float]) -> BlockFactory:
    """Return what makes blocks of one style; ``dropout_at`` gives the probability at a side."""

    def make_block(
        inputs: int,
        outputs: int,
        *,
        side: int,
        part: Half,
        resample: ResampleMode = "keep",
        attention: bool = False,
    ) -> nn.Module:
        dropout = dropout_at(side)
        return UNetBlock(
            inputs, outputs, style, dropout=dropout, resample=resample, attention=attention
        )

    return make_block


@dataclass(frozen=True)
class BodyPlan:
    """Sizes: ``side`` of the image in pixels, output channels of the first convolution, widths by
    resolution, blocks per resolution, resolutions with attention, whether a decoder resolution has
    attention in its last block only (Song et al.) or in all of them, and whether the first of the
    middle blocks has attention.
    """

    side: int
    stem: int
    widths: tuple[int, ...]
    blocks: int
    attention_resolutions: tuple[int, ...]
    last_attention_only: bool = False
    middle_attention: bool = True


class UNetBody(nn.Module):
    """Encoder, two middle blocks (the first with attention), decoder with one skip per block."""

    def __init__(
        self,
        plan: BodyPlan,
        stem: nn.Module,
        make_block: BlockFactory,
        *,
        join: Callable[[Value, Value], Value],
        pyramid: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.pyramid = pyramid
        self.join = join
        self.downs, self.encoder = nn.ModuleList(), nn.ModuleList()
        skips = self._build_encoder(plan, make_block)
        side, width = plan.side >> (len(plan.widths) - 1), plan.widths[-1]
        self.middle = Stage(
            [
                make_block(
                    width, width, side=side, part="decoder", attention=plan.middle_attention
                ),
                make_block(width, width, side=side, part="decoder"),
            ]
        )
        self.ups, self.decoder = nn.ModuleList(), nn.ModuleList()
        self._build_decoder(plan, make_block, skips)

    def _build_encoder(self, plan: BodyPlan, make_block: BlockFactory) -> list[int]:
        channels, skips = plan.stem, [plan.stem]
        for level, width in enumerate(plan.widths):
            side = plan.side >> level
            if level:
                self.downs.append(
                    make_block(channels, channels, side=side, part="encoder", resample="down")
                )
                skips.append(channels)
            stage = Stage()
            for _ in range(plan.blocks):
                attention = side in plan.attention_resolutions
                stage.append(
                    make_block(channels, width, side=side, part="encoder", attention=attention)
                )
                channels = width
                skips.append(channels)
            self.encoder.append(stage)
        return skips

    def _build_decoder(self, plan: BodyPlan, make_block: BlockFactory, skips: list[int]) -> None:
        channels = plan.widths[-1]
        for level in reversed(range(len(plan.widths))):
            side, width = plan.side >> level, plan.widths[level]
            if level < len(plan.widths) - 1:
                self.ups.append(
                    make_block(channels, channels, side=side, part="decoder", resample="up")
                )
            stage = Stage()
            for index in range(plan.blocks + 1):
                last = index == plan.blocks or not plan.last_attention_only
                stage.append(
                    make_block(
                        channels + skips.pop(),
                        width,
                        side=side,
                        part="decoder",
                        attention=last and side in plan.attention_resolutions,
                    )
                )
                channels = width
            self.decoder.append(stage)

    def units(self) -> list[nn.Module]:
        """Return all blocks, each once."""
        stages = (*self.encoder, self.middle, *self.decoder)
        blocks = [block for stage in stages for block in cast(Stage, stage)]
        return [*self.downs, *self.ups, *blocks]

    def forward(self, x: Value, emb: Value, *, checkpointing: bool = False) -> Value:
        """Map the input ``[N, C, H, W]`` to ``[N, widths[0], H, W]``."""
        aux: Value = ops.linear_map(favour_layout, x)
        h: Value = self.stem(aux)
        skips: list[Value] = [h]
        for level, stage in enumerate(self.encoder):
            if level:
                h = run_block(self.downs[level - 1], h, emb, checkpointing=checkpointing)
                if self.pyramid is not None:
                    h = aux = ops.residual(h, self.pyramid[level - 1](aux), math.sqrt(0.5))
                skips.append(h)
            for block in cast(Stage, stage):
                h = run_block(block, h, emb, checkpointing=checkpointing)
                skips.append(h)
        h = self.middle(h, emb, checkpointing=checkpointing)
        for level, stage in enumerate(self.decoder):
            if level:
                h = run_block(self.ups[level - 1], h, emb, checkpointing=checkpointing)
            for block in cast(Stage, stage):
                h = self.join(h, skips.pop())
                h = run_block(block, h, emb, checkpointing=checkpointing)
        return h


def concatenate(h: Value, skip: Value) -> Value:
    """Join ``[N, C, H, W]`` and a skip ``[N, S, H, W]`` to ``[N, C + S, H, W]``."""
    return ops.cat([h, skip])


class UNet(Network):
    """A network of an embedding, a :class:`UNetBody`, and a normalised output convolution."""

    embedding: nn.Module
    body_net: UNetBody
    norm_out: nn.Module
    conv_out: nn.Module

    def units(self) -> list[nn.Module]:
        """Return the blocks of the U-Net."""
        return self.body_net.units()

    def body(
        self,
        x: Value,
        c_noise: Value,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        conditions: Mapping[str, Value],
    ) -> Value:
        """Compute F; see :meth:`Network.forward`."""
        emb = self.embedding(c_noise, labels, augment_labels, conditions)
        h = self.body_net(x, emb, checkpointing=self.gradient_checkpointing)
        y: Value = self.conv_out(ops.silu(self.norm_out(h)))
        return y
