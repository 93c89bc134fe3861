"""ADM (Dhariwal & Nichol 2021, arXiv:2105.05233), as EDM and OpenAI's consistency models use it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmbench.networks import ops
from cmbench.networks.base import check_resolution
from cmbench.networks.blocks import BlockStyle
from cmbench.networks.config import ADMConfig
from cmbench.networks.dual import Value
from cmbench.networks.embedding import ConditionEmbedding, check_augment
from cmbench.networks.layers import (
    ClassEmbedding,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
)
from cmbench.networks.unet_body import BodyPlan, UNet, UNetBody, concatenate, styled_blocks

_UNIFORM = Init("kaiming-uniform", math.sqrt(1.0 / 3.0))
_ZERO = Init(gain=0.0)


class ADMEmbedding(nn.Module):
    """``silu(L1 silu(L0(e(c_noise) + augmentation + conditions)) + class)``, in float32 or more."""

    def __init__(self, config: ADMConfig, num_classes: int, outputs: int) -> None:
        super().__init__()
        inputs = config.channels
        self.time_factor, self.augment_dim = config.time_factor, config.augment_dim
        self.noise: nn.Module = PositionalEmbedding(inputs, endpoint=False, sine_first=False)
        if config.embedding == "fourier":
            self.noise = FourierEmbedding(inputs, config.fourier_scale)
        self.augment = (
            Linear(config.augment_dim, inputs, bias=False, init=_ZERO)
            if config.augment_dim
            else None
        )
        self.conditions = ConditionEmbedding(config.conditions, inputs)
        self.layer0 = Linear(inputs, outputs, init=_UNIFORM)
        self.layer1 = Linear(outputs, outputs, init=_UNIFORM)
        self.label: ClassEmbedding | None = None
        if num_classes:
            self.label = ClassEmbedding(
                num_classes,
                outputs,
                dropout=config.label_dropout,
                init=Init("kaiming-normal", math.sqrt(num_classes)),
            )

    def forward(
        self,
        c_noise: Value,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        conditions: Mapping[str, Value],
    ) -> Value:
        """Map ``c_noise`` ``[N]`` to the embedding ``[N, outputs]``."""
        with torch.autocast(c_noise.device.type, enabled=False):
            emb: Value = self.noise(ops.scale(c_noise, self.time_factor))
            if self.augment is not None and augment_labels is not None:
                emb = ops.add(emb, check_augment(self.augment, augment_labels, self.augment_dim))
            emb = self.conditions(emb, conditions)
            emb = self.layer1(ops.silu(self.layer0(emb)))
            if self.label is not None:
                emb = ops.add(emb, self.label(labels, c_noise.shape[0]))
            return ops.silu(emb)


class ADM(UNet):
    """Adaptive group normalisation, residual blocks that resample, multi-head attention."""

    Config: ClassVar[type[ADMConfig]] = ADMConfig
    config: ADMConfig
    embedding: ADMEmbedding

    def __init__(
        self, config: ADMConfig, data_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__(config, data_shape, num_classes)
        side = check_resolution("ADM", data_shape, 2 ** (len(config.channel_mult) - 1))
        style = BlockStyle(
            states=config.states,
            temporal_modes=config.temporal_modes,
            embedding_dim=config.channels * config.embedding_mult,
            conditioning=config.conditioning,
            min_group_channels=config.min_group_channels,
            channels_per_head=config.channels_per_head,
            init=_UNIFORM,
            init_zero=_ZERO,
            init_attention=_UNIFORM,
        )
        self.embedding = ADMEmbedding(config, num_classes, style.embedding_dim)
        widths = tuple(config.channels * mult for mult in config.channel_mult)
        plan = BodyPlan(
            side,
            widths[0],
            widths,
            config.blocks,
            config.attention_resolutions,
            middle_attention=config.middle_attention,
        )

        stem = Conv2d(data_shape[0], widths[0], 3, init=_UNIFORM)
        make_block = styled_blocks(style, config.dropout_at)
        self.body_net = UNetBody(plan, stem, make_block, join=concatenate)
        self.norm_out = GroupNorm(widths[0], min_channels=config.min_group_channels)
        self.conv_out = Conv2d(widths[0], data_shape[0], 3, init=_ZERO)
