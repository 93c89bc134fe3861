"""Configurations of the networks: frozen, unknown keys refused, no torch.

Every network takes its shape (channels, resolution, classes) from the dataset; a config holds what
is left to choose. Numbers of channels count feature maps, probabilities lie in [0, 1).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from cmbench.plugin.config import Options

Embedding = Literal["positional", "fourier"]
#: How the noise level and the class act inside a block (see ``blocks.Modulation``).
Conditioning = Literal["additive", "scale-shift", "double"]


ConditionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,29}$")]
#: Fields that several networks have; each gives its own default.
Width = Annotated[int, Field(ge=1, description="base width (channels)")]
Widths = Annotated[
    tuple[int, ...], Field(min_length=1, description="width per resolution (multiples of the base)")
]
Blocks = Annotated[int, Field(ge=1, description="residual blocks per resolution (count)")]
DeepBlocks = Annotated[
    int,
    Field(ge=1, description="residual blocks per resolution (count; the deep variants double it)"),
]
Attention = Annotated[
    tuple[int, ...], Field(description="resolutions with self-attention (pixels)")
]
MiddleAttention = Annotated[
    bool, Field(description="self-attention between encoder and decoder (yes or no)")
]
HeadSize = Annotated[int, Field(ge=1, description="attention head size (channels)")]
BlockConditioning = Annotated[
    Conditioning, Field(description="how noise level and class modulate a block")
]
EmbeddingWidth = Annotated[
    int, Field(ge=1, description="width of the embedding (multiples of the base)")
]
ChosenEmbedding = Annotated[
    Embedding,
    Field(description="noise embedding: positional (smooth, for c_noise = t) or random fourier"),
]
FourierScale = Annotated[
    float,
    Field(
        gt=0.0,
        description="standard deviation of the fourier frequencies (cycles per unit of c_noise)",
    ),
]
NoiseWidth = Annotated[
    int, Field(ge=1, description="size of the noise embedding (multiples of the base)")
]
Pyramid = Annotated[bool, Field(description="add a filtered input pyramid to the encoder (NCSN++)")]
Taps = Annotated[
    tuple[float, ...],
    Field(min_length=2, description="separable resampling filter (unnormalised taps)"),
]


class NetworkConfig(Options):
    """What all networks share."""

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
    conditions: tuple[ConditionName, ...] = Field(
        default=(),
        description="further scalars that the network receives for each image, such as a second "
        "time or a guidance scale; their layers start at zero (names)",
    )
    states: int = Field(
        default=1,
        ge=1,
        description="states of a trajectory that the network computes at once, each with a noise "
        "label of its own (count; 1 = images)",
    )
    temporal_modes: int = Field(
        default=2,
        ge=1,
        description="Fourier modes along the states that are mixed after every block (count, up "
        "to states / 2 + 1; without effect for one state)",
    )

    @field_validator("conditions")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len({*names}) < len(names):
            raise ValueError("a name occurs twice")
        return names

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a network does not have: recipes without it keep their hash."""
        table: dict[str, Any] = handler(self)
        if not self.conditions:
            table.pop("conditions", None)
        if self.states == 1:
            table.pop("states", None)
            table.pop("temporal_modes", None)
        return table


class EmbeddedConfig(NetworkConfig):
    """A network whose noise embedding can be chosen."""

    embedding: ChosenEmbedding = "positional"
    fourier_scale: FourierScale = 16.0


class UNetTinyConfig(EmbeddedConfig):
    """A small DDPM++-style U-Net for 8x8 to 32x32 images."""

    channels: Width = 32
    channel_mult: Widths = (1,)
    blocks: Blocks = 2
    patch_size: Literal[1, 2, 4] = Field(
        default=2, description="pixels folded into channels at the input, per side (pixels)"
    )
    attention_resolutions: tuple[int, ...] = Field(
        default=(), description="resolutions with self-attention (pixels, after patching)"
    )
    channels_per_head: HeadSize = 32
    conditioning: BlockConditioning = "scale-shift"
    embedding_mult: EmbeddingWidth = 4


class MLPConfig(EmbeddedConfig):
    """A residual multilayer perceptron over flattened data."""

    width: int = Field(default=128, ge=8, description="hidden width (features)")
    blocks: int = Field(default=3, ge=1, description="residual blocks (count)")
    expansion: int = Field(
        default=1, ge=1, description="width inside a block (multiples of the hidden width)"
    )
    embedding_dim: int = Field(
        default=64, ge=2, multiple_of=2, description="size of the noise embedding (features)"
    )


class ResolutionDropoutConfig(NetworkConfig):
    """A network whose dropout can be kept to the low resolutions."""

    dropout_max_resolution: int | None = Field(
        default=None,
        ge=1,
        description="highest resolution with dropout (pixels; none = all; iCT and sCM use 16)",
    )

    def dropout_at(self, side: int) -> float:
        """Return the dropout probability of a block whose output is ``side`` pixels wide."""
        top = self.dropout_max_resolution
        return self.dropout if top is None or side <= top else 0.0


class UNetConfig(ResolutionDropoutConfig):
    """What the published U-Nets share."""

    channels: Width = 128
    channel_mult: Widths = (2, 2, 2)
    blocks: DeepBlocks = 4
    attention_resolutions: Attention = (16,)
    middle_attention: MiddleAttention = True
    embedding_mult: EmbeddingWidth = 4


class DDPMPPConfig(UNetConfig, EmbeddedConfig):
    """DDPM++ as in EDM: 55.7M parameters at these defaults on 32x32x3, augment_dim 9."""

    noise_mult: NoiseWidth = 1
    pyramid: Pyramid = False
    filter_taps: Taps = (1, 1)
    conditioning: BlockConditioning = "additive"


class NCSNPPConfig(DDPMPPConfig):
    """NCSN++ as in EDM: 56.4M parameters at these defaults on 32x32x3, augment_dim 9."""

    embedding: ChosenEmbedding = "fourier"
    noise_mult: NoiseWidth = 2
    pyramid: Pyramid = True
    filter_taps: Taps = (1, 3, 3, 1)


class ADMConfig(UNetConfig, EmbeddedConfig):
    """ADM: 295.9M parameters at these defaults on 64x64x3 with 1000 classes."""

    channels: Width = 192
    channel_mult: Widths = (1, 2, 3, 4)
    blocks: DeepBlocks = 3
    attention_resolutions: Attention = (32, 16, 8)
    channels_per_head: HeadSize = 64
    conditioning: BlockConditioning = "scale-shift"
    time_factor: float = Field(
        default=1.0,
        gt=0.0,
        description="c_noise is multiplied by this first (OpenAI's weights: 1000; a pure number)",
    )
    min_group_channels: int = Field(
        default=4, ge=1, description="fewest channels in a normalisation group (OpenAI: 1)"
    )


class EDM2Config(ResolutionDropoutConfig):
    """EDM2's magnitude-preserving U-Net (config G). Widths: XS 128, S 192, M 256, L 320, XL 384,
    XXL 448 channels.
    """

    channels: Width = 192
    channel_mult: Widths = (1, 2, 3, 4)
    blocks: Blocks = 3
    attention_resolutions: Attention = (16, 8)
    channels_per_head: HeadSize = 64
    embedding: Embedding = Field(
        default="fourier", description="noise embedding: random fourier (EDM2) or positional (sCM)"
    )
    fourier_scale: FourierScale = 1.0
    conditioning: Literal["scale", "double"] = Field(
        default="scale", description="how noise level and class modulate a block"
    )
    label_balance: float = Field(
        default=0.5, ge=0.0, le=1.0, description="share of the class in the embedding (0 to 1)"
    )
    concat_balance: float = Field(
        default=0.5, ge=0.0, le=1.0, description="share of the skip when concatenating (0 to 1)"
    )
    residual_balance: float = Field(
        default=0.3, ge=0.0, le=1.0, description="share of a residual branch (0 to 1)"
    )
    attention_balance: float = Field(
        default=0.3, ge=0.0, le=1.0, description="share of an attention branch (0 to 1)"
    )
    clip_activations: float | None = Field(
        default=256.0,
        gt=0.0,
        description="activations are clipped to this magnitude (units; none = not at all)",
    )
    middle_attention: MiddleAttention = True
    filter_taps: Taps = (1, 1)
    noise_mult: int | None = Field(
        default=None,
        ge=1,
        description="size of the noise embedding (multiples of the base; none = the first width)",
    )
    embedding_mult: int | None = Field(
        default=None,
        ge=1,
        description="width of the embedding (multiples of the base; none = the largest width)",
    )
    logvar_channels: int = Field(
        default=0,
        ge=0,
        multiple_of=2,
        description="features of the log-variance head that imported weights bring along (count; "
        "0 = none, EDM2's 128). Training keeps its own beside the network: edm's logvar_channels",
    )
