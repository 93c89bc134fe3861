"""EDM2's magnitude-preserving U-Net, config G (Karras et al. 2024, arXiv:2312.02696)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks import ops
from cmbench.networks.attention import (
    AttentionBase,
    attention,
    head_count,
    merge_heads,
    split_heads,
)
from cmbench.networks.base import Network, check_resolution
from cmbench.networks.config import EDM2Config
from cmbench.networks.dual import Value
from cmbench.networks.heads import MPLogVariance
from cmbench.networks.layers import ClassEmbedding, Resample, ResampleMode
from cmbench.networks.magnitude import (
    EPS,
    MPConv,
    MPFourier,
    MPPositional,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weight,
)
from cmbench.networks.temporal import temporal_mixing
from cmbench.networks.unet_body import BodyPlan, Half, UNetBody


class MPClassEmbedding(ClassEmbedding):
    """A unit-magnitude vector per class."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__(num_classes, dim, scale=math.sqrt(num_classes), dropout=dropout)
        with torch.no_grad():
            self.weight.normal_()

    def forward(self, labels: Tensor | None, n: int) -> Tensor:
        """Map class indices ``[N]`` to ``[N, dim]``."""
        weight = normalize_weight(self.weight) / math.sqrt(self.num_classes)
        return self.one_hot(labels, n) * self.scale @ weight.T

    def normalize(self) -> None:
        """Project the stored weights, in place."""
        with torch.no_grad():
            self.weight.copy_(normalize_weight(self.weight))


class MPCondition(nn.Module):
    """A further scalar: its positional features, through a layer with a gain that starts at 0."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.features = MPPositional(features)
        self.linear = MPConv(features, outputs, 0)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, value: Value) -> Value:
        """Map ``[N]`` to ``[N, outputs]``."""
        added: Value = self.linear(self.features(value), self.gain)
        return added


class MPConditions(nn.Module):
    """Adds further scalars to an embedding, each by its :class:`MPCondition`."""

    def __init__(self, names: Sequence[str], features: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"of_{n}": MPCondition(features, outputs) for n in names})

    def forward(self, emb: Value, conditions: Mapping[str, Value]) -> Value:
        """Add ``conditions`` ``[N]`` to ``emb`` ``[N, E]``."""
        for name, value in conditions.items():
            emb = ops.add(emb, self.layers[f"of_{name}"](value))
        return emb


class MPAttention(AttentionBase):
    """Self-attention with normalised queries, keys and values (cosine attention).

    Rows of ``qkv``: q, k, v, each by head, then channel.
    """

    def __init__(self, channels: int, per_head: int) -> None:
        super().__init__()
        self.heads = head_count(channels, per_head)
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.proj = MPConv(channels, channels, 1)

    def forward(self, x: Value) -> Value:
        """Return the branch ``[N, C, H, W]``."""
        qkv = ops.normalize(split_heads(self.qkv(x), self.heads), -1, EPS)
        y = attention(*ops.unbind(qkv), explicit=self.explicit)
        return self.proj(merge_heads(y, x.shape))  # type: ignore[no-any-return]


class EDM2Block(nn.Module):
    """Resample, (normalise), residual branch with a learned per-channel gain, attention, clip."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: EDM2Config,
        embedding_dim: int,
        *,
        side: int,
        part: Half,
        resample: ResampleMode = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.part = config, part
        self.dropout = config.dropout_at(side)
        self.resample = Resample(resample, config.filter_taps)
        self.skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.conv0 = MPConv(outputs if part == "encoder" else inputs, outputs, 3)
        double = config.conditioning == "double"
        self.affine = MPConv(embedding_dim, outputs * (2 if double else 1), 0)
        # pnorm ignores a gain.
        self.gain = None if double else nn.Parameter(torch.zeros(()))
        self.conv1 = MPConv(outputs, outputs, 3)
        self.attention = MPAttention(outputs, config.channels_per_head) if attention else None
        self.temporal = temporal_mixing(config, outputs)

    def _modulate(self, h: Value, emb: Value) -> Value:
        params = self.affine(emb, self.gain)
        if self.config.conditioning == "scale":
            factor = ops.add_constant(params, 1.0)
            return ops.mul(h, ops.linear_map(lambda v: v[:, :, None, None], factor))
        # sCM's double normalisation; the factor sqrt(1/2) keeps the sum at unit magnitude.
        factor, shift = (ops.pixel_norm(v, EPS) for v in ops.halves(params))
        y = ops.scale_shift(ops.normalize(h, 1, EPS), factor, shift)
        return ops.scale(y, math.sqrt(0.5))

    def forward(self, x: Value, emb: Value) -> Value:
        """Map ``[N, inputs, H, W]`` and the embedding ``[N, E]`` to ``[N, outputs, H', W']``."""
        config = self.config
        x = self.resample(x)
        if self.part == "encoder":
            x = x if self.skip is None else self.skip(x)
            x = ops.normalize(x, 1, EPS)
        h = self._modulate(self.conv0(mp_silu(x)), emb)
        h = self.conv1(ops.dropout(mp_silu(h), self.dropout, self.training))
        if self.part == "decoder" and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, h, config.residual_balance)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), config.attention_balance)
        if self.temporal is not None:
            x = self.temporal(x)
        bound = config.clip_activations
        return x if bound is None else ops.clip(x, bound)


class EDM2(Network):
    """The raw network. Call :meth:`normalize_weights` after every optimizer step."""

    Config: ClassVar[type[EDM2Config]] = EDM2Config
    weight_methods = ("log_variance",)
    config: EDM2Config

    def __init__(
        self, config: EDM2Config, data_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__(config, data_shape, num_classes)
        if config.augment_dim:
            raise UserError(
                "edm2",
                f"augment_dim {config.augment_dim}",
                allowed="0 (EDM2 has no augmentation input)",
                remedy="leave it out or choose ddpmpp, ncsnpp or adm",
            )
        side = check_resolution("edm2", data_shape, 2 ** (len(config.channel_mult) - 1))
        widths = tuple(config.channels * mult for mult in config.channel_mult)
        noise_dim = config.channels * (config.noise_mult or config.channel_mult[0])
        embedding_dim = config.channels * (config.embedding_mult or max(config.channel_mult))
        self.noise: nn.Module = (
            MPFourier(noise_dim, config.fourier_scale)
            if config.embedding == "fourier"
            else MPPositional(noise_dim)
        )
        self.noise_linear = MPConv(noise_dim, embedding_dim, 0)
        labels = (num_classes, embedding_dim, config.label_dropout)
        self.label = MPClassEmbedding(*labels) if num_classes else None

        self.conditions = MPConditions(config.conditions, noise_dim, embedding_dim)
        make_block = partial(EDM2Block, config=config, embedding_dim=embedding_dim)
        plan = BodyPlan(
            side,
            widths[0],
            widths,
            config.blocks,
            config.attention_resolutions,
            middle_attention=config.middle_attention,
        )
        # One constant channel at the input takes the place of biases.
        stem = MPConv(data_shape[0] + 1, widths[0], 3)
        self.body_net = UNetBody(plan, stem, make_block, join=self._join)
        self.conv_out = MPConv(widths[0], data_shape[0], 3)
        self.gain_out = nn.Parameter(torch.zeros(()))
        self.logvar = MPLogVariance(config.logvar_channels) if config.logvar_channels else None

    def _join(self, h: Value, skip: Value) -> Value:
        return mp_cat(h, skip, self.config.concat_balance)

    def _embed(
        self, c_noise: Value, labels: Tensor | None, conditions: Mapping[str, Value]
    ) -> Value:
        with torch.autocast(c_noise.device.type, enabled=False):
            emb: Value = self.noise_linear(self.noise(c_noise))
            if self.label is not None:
                vector = self.label(labels, c_noise.shape[0])
                emb = mp_sum(emb, vector, self.config.label_balance)
            return mp_silu(self.conditions(emb, conditions))

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
        emb = self._embed(c_noise, labels, conditions)
        n, _, height, width = x.shape
        ones = torch.ones((n, 1, height, width), dtype=x.dtype, device=x.device)
        h = self.body_net(ops.cat([x, ones]), emb, checkpointing=self.gradient_checkpointing)
        y: Value = self.conv_out(h, self.gain_out)
        return y

    def log_variance(self, c_noise: Tensor) -> Tensor:
        """Return EDM2's learned log-variance ``u(sigma)`` ``[N]`` (needs ``logvar_channels``)."""
        if self.logvar is None:
            raise UserError(
                "edm2",
                "this network has no log-variance head",
                allowed="logvar_channels > 0",
                remedy="set logvar_channels (EDM2: 128)",
            )
        y: Tensor = self.logvar(c_noise)
        return y

    def normalize_weights(self) -> None:
        """Force every weight row to unit mean square, in place (Sec. 2.3)."""
        for module in self.modules():
            if isinstance(module, (MPConv, MPClassEmbedding)):
                module.normalize()
