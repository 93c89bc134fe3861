"""Configurations of the networks: frozen, unknown keys refused, no torch.

Every network takes its shape (channels, resolution, classes) from the dataset; a config holds what
is left to choose. Numbers of channels count feature maps, probabilities lie in [0, 1).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Embedding = Literal["positional", "fourier"]
#: How the noise level and the class act inside a block (see ``blocks.Modulation``).
Conditioning = Literal["additive", "scale-shift", "double"]


class NetworkConfig(BaseModel):
    """What all networks share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="dropout inside the blocks (probability)"
    )
    label_dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="chance of hiding an image's class while training (probability)",
    )
    augment_dim: int = Field(
        default=0, ge=0, description="size of the augmentation label (numbers; 0 = none)"
    )


class EmbeddedConfig(NetworkConfig):
    """A network whose noise embedding can be chosen."""

    embedding: Embedding = Field(
        default="positional",
        description="noise embedding: positional (smooth, for c_noise = t) or random fourier",
    )
    fourier_scale: float = Field(
        default=16.0,
        gt=0.0,
        description="standard deviation of the fourier frequencies (cycles per unit of c_noise)",
    )


class UNetTinyConfig(EmbeddedConfig):
    """A small DDPM++-style U-Net for 8x8 to 32x32 images."""

    channels: int = Field(default=32, ge=8, multiple_of=8, description="base width (channels)")
    channel_mult: tuple[int, ...] = Field(
        default=(1, 2), min_length=1, description="width per resolution, in multiples of the base"
    )
    blocks: int = Field(default=1, ge=1, description="residual blocks per resolution (count)")
    patch_size: Literal[1, 2, 4] = Field(
        default=1, description="pixels folded into channels at the input, per side (pixels)"
    )
    attention_resolutions: tuple[int, ...] = Field(
        default=(), description="resolutions with self-attention (pixels, after patching)"
    )
    channels_per_head: int = Field(default=32, ge=1, description="attention head size (channels)")
    conditioning: Conditioning = Field(
        default="scale-shift", description="how noise level and class modulate a block"
    )
    embedding_mult: int = Field(
        default=4, ge=1, description="width of the embedding, in multiples of the base"
    )


class MLPConfig(EmbeddedConfig):
    """A residual multilayer perceptron over flattened data."""

    width: int = Field(default=128, ge=8, description="hidden width (features)")
    blocks: int = Field(default=3, ge=1, description="residual blocks (count)")
    expansion: int = Field(
        default=1, ge=1, description="width inside a block, in multiples of the hidden width"
    )
    embedding_dim: int = Field(
        default=64, ge=2, multiple_of=2, description="size of the noise embedding (features)"
    )
