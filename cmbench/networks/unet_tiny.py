"""``unet-tiny``: a DDPM++-style U-Net small enough to train on two CPU cores in minutes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cmbench.networks import ops
from cmbench.networks.base import Network, check_resolution
from cmbench.networks.blocks import BlockStyle, Stage, UNetBlock
from cmbench.networks.config import UNetTinyConfig
from cmbench.networks.dual import Value
from cmbench.networks.embedding import NoiseLabelEmbedding
from cmbench.networks.layers import Conv2d, GroupNorm, Init, ResampleMode, favour_layout


class UNetTiny(Network):
    """One skip per resolution, one middle block, optional space-to-depth at the input.

    With ``patch_size`` 2 an 8x8 image is worked on as 4x4 pixels of four times the channels: the
    convolutions then cost a quarter.
    """

    Config: ClassVar[type[UNetTinyConfig]] = UNetTinyConfig
    config: UNetTinyConfig

    def __init__(
        self, config: UNetTinyConfig, data_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__(config, data_shape, num_classes)
        halvings = len(config.channel_mult) - 1
        side = check_resolution("unet-tiny", data_shape, config.patch_size * 2**halvings)
        side //= config.patch_size
        in_channels = data_shape[0] * config.patch_size**2
        widths = [config.channels * mult for mult in config.channel_mult]
        style = _style(config)
        self.embedding = NoiseLabelEmbedding(
            config, num_classes, inputs=config.channels, outputs=style.embedding_dim
        )

        self.conv_in = Conv2d(in_channels, widths[0], 3)
        self._build_levels(widths, partial(_block, config, style, side))
        self.norm_out = GroupNorm(widths[0], eps=style.eps)
        self.conv_out = Conv2d(widths[0], in_channels, 3, init=Init(gain=0.0))

    def _build_levels(self, widths: list[int], block: Callable[..., UNetBlock]) -> None:
        blocks, last = self.config.blocks, len(widths) - 1
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            first = [block(widths[level - 1], width, level, "down")] if level else []
            more = [block(width, width, level) for _ in range(blocks - len(first))]
            self.encoder.append(Stage(first + more))
        self.middle = Stage([block(widths[-1], widths[-1], last)])
        self.ups = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for level in reversed(range(last)):
            width = widths[level]
            self.ups.append(Stage([block(widths[level + 1], width, level, "up")]))
            more = [block(width, width, level) for _ in range(blocks - 1)]
            self.decoder.append(Stage([block(2 * width, width, level), *more]))

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
        keep = {"checkpointing": self.gradient_checkpointing}
        h: Value = self.conv_in(ops.linear_map(self._fold, x))
        skips = []
        for stage in self.encoder:
            h = stage(h, emb, **keep)
            skips.append(h)
        skips.pop()
        h = self.middle(h, emb, **keep)
        for up, stage in zip(self.ups, self.decoder, strict=True):
            h = stage(ops.cat([up(h, emb, **keep), skips.pop()]), emb, **keep)
        return ops.linear_map(self._unfold, self.conv_out(ops.silu(self.norm_out(h))))

    def _fold(self, x: Tensor) -> Tensor:
        patch = self.config.patch_size
        return favour_layout(F.pixel_unshuffle(x, patch) if patch > 1 else x)

    def _unfold(self, y: Tensor) -> Tensor:
        patch = self.config.patch_size
        return F.pixel_shuffle(y, patch) if patch > 1 else y


def _style(config: UNetTinyConfig) -> BlockStyle:
    return BlockStyle(
        states=config.states,
        temporal_modes=config.temporal_modes,
        embedding_dim=config.channels * config.embedding_mult,
        conditioning=config.conditioning,
        skip_scale=math.sqrt(0.5),
        eps=1e-6,
        channels_per_head=config.channels_per_head,
        init_zero=Init(gain=1e-5),
        init_attention=Init(gain=math.sqrt(0.2)),
    )


def _block(
    config: UNetTinyConfig,
    style: BlockStyle,
    side: int,
    inputs: int,
    outputs: int,
    level: int,
    resample: ResampleMode = "keep",
) -> UNetBlock:
    attention = side >> level in config.attention_resolutions and resample != "up"
    return UNetBlock(
        inputs, outputs, style, dropout=config.dropout, resample=resample, attention=attention
    )
