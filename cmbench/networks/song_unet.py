"""DDPM++ and NCSN++ (Song et al. 2021, arXiv:2011.13456) in EDM's form (arXiv:2206.00364, F.2)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cmbench.networks import ops
from cmbench.networks.base import check_resolution
from cmbench.networks.blocks import BlockStyle
from cmbench.networks.config import DDPMPPConfig, NCSNPPConfig
from cmbench.networks.dual import Value
from cmbench.networks.embedding import NoiseLabelEmbedding
from cmbench.networks.layers import Conv2d, GroupNorm, Init, Resample
from cmbench.networks.unet_body import BodyPlan, UNet, UNetBody, concatenate, styled_blocks

_NEAR_ZERO = Init(gain=1e-5)


class PyramidStep(nn.Module):
    """NCSN++'s residual input pyramid: convolve at full resolution, then filter and halve.

    The border is padded once, for convolution and filter together.
    """

    def __init__(self, inputs: int, outputs: int, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.conv = Conv2d(inputs, outputs, 3)
        self.conv.padding += (len(taps) - 1) // 2
        self.down = Resample("down", taps)

    def _filter(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.down.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, groups=channels)

    def forward(self, x: Value) -> Value:
        """Map ``[N, inputs, H, W]`` to ``[N, outputs, H/2, W/2]``."""
        return ops.linear_map(self._filter, self.conv(x))


class DDPMPP(UNet):
    """DDPM++; with ``pyramid``, Fourier embedding and the wider filter it is NCSN++."""

    Config: ClassVar[type[DDPMPPConfig]] = DDPMPPConfig
    config: DDPMPPConfig

    def __init__(
        self, config: DDPMPPConfig, data_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__(config, data_shape, num_classes)
        side = check_resolution(
            type(self).__name__, data_shape, 2 ** (len(config.channel_mult) - 1)
        )
        style = _style(config)
        self.embedding = NoiseLabelEmbedding(
            config,
            num_classes,
            inputs=config.channels * config.noise_mult,
            outputs=style.embedding_dim,
        )
        widths = tuple(config.channels * mult for mult in config.channel_mult)
        plan = BodyPlan(
            side,
            config.channels,
            widths,
            config.blocks,
            config.attention_resolutions,
            last_attention_only=True,
            middle_attention=config.middle_attention,
        )

        self.body_net = UNetBody(
            plan,
            Conv2d(data_shape[0], config.channels, 3),
            styled_blocks(style, config.dropout_at),
            join=concatenate,
            pyramid=_pyramid(config, data_shape[0], widths) if config.pyramid else None,
        )
        self.norm_out = GroupNorm(widths[0], eps=style.eps)
        self.conv_out = Conv2d(widths[0], data_shape[0], 3, init=_NEAR_ZERO)


class NCSNPP(DDPMPP):
    """NCSN++: the same class with other defaults."""

    Config: ClassVar[type[DDPMPPConfig]] = NCSNPPConfig


def _pyramid(config: DDPMPPConfig, channels: int, widths: tuple[int, ...]) -> nn.ModuleList:
    steps = nn.ModuleList()
    for width in widths[:-1]:
        steps.append(PyramidStep(channels, width, config.filter_taps))
        channels = width
    return steps


def _style(config: DDPMPPConfig) -> BlockStyle:
    return BlockStyle(
        states=config.states,
        temporal_modes=config.temporal_modes,
        embedding_dim=config.channels * config.embedding_mult,
        conditioning=config.conditioning,
        skip_scale=math.sqrt(0.5),
        eps=1e-6,
        taps=config.filter_taps,
        resample_projection=True,
        init_zero=_NEAR_ZERO,
        init_attention=Init(gain=math.sqrt(0.2)),
    )
