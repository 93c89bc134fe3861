"""The embedding of noise level, class and augmentation that modulates every block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks import ops
from cmbench.networks.config import EmbeddedConfig
from cmbench.networks.dual import Value
from cmbench.networks.layers import (
    ClassEmbedding,
    Init,
    Linear,
    PositionalEmbedding,
    make_embedding,
)

#: Cosines and sines of a further scalar.
_CONDITION_FEATURES = 64


class NoiseLabelEmbedding(nn.Module):
    """``silu(L1 silu(L0(e(c_noise) + class + augmentation + conditions)))``, in float32 or more.

    Float32 under autocast too: bfloat16 times ruin the tangent (measured: 0.3 relative at t_max).
    """

    def __init__(
        self, config: EmbeddedConfig, num_classes: int, *, inputs: int, outputs: int
    ) -> None:
        super().__init__()
        self.augment_dim = config.augment_dim
        self.noise = make_embedding(config.embedding, inputs, config.fourier_scale)
        self.label: ClassEmbedding | None = None
        if num_classes:
            self.label = ClassEmbedding(
                num_classes,
                inputs,
                scale=math.sqrt(num_classes),
                bias=True,
                dropout=config.label_dropout,
            )
        self.augment = (
            Linear(config.augment_dim, inputs, bias=False) if config.augment_dim else None
        )
        self.conditions = ConditionEmbedding(config.conditions, inputs)
        self.layer0 = Linear(inputs, outputs)
        self.layer1 = Linear(outputs, outputs)

    def forward(
        self,
        c_noise: Value,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        conditions: Mapping[str, Value],
    ) -> Value:
        """Map ``c_noise`` ``[N]`` to the embedding ``[N, outputs]``."""
        with torch.autocast(c_noise.device.type, enabled=False):
            emb: Value = self.noise(c_noise)
            if self.label is not None:
                emb = ops.add(emb, self.label(labels, c_noise.shape[0]))
            if self.augment is not None and augment_labels is not None:
                emb = ops.add(emb, check_augment(self.augment, augment_labels, self.augment_dim))
            emb = self.conditions(emb, conditions)
            return ops.silu(self.layer1(ops.silu(self.layer0(emb))))


class ConditionEmbedding(nn.Module):
    """Adds further scalars to an embedding: one linear map of positional features for each.

    The maps start at zero, so a network with new conditions computes what it computed without.
    """

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        self.features = PositionalEmbedding(_CONDITION_FEATURES, sine_first=False)
        zero = Init(gain=0.0)
        self.layers = nn.ModuleDict(
            {f"of_{n}": Linear(_CONDITION_FEATURES, dim, bias=False, init=zero) for n in names}
        )

    def forward(self, emb: Value, conditions: Mapping[str, Value]) -> Value:
        """Add ``conditions`` ``[N]`` to ``emb`` ``[N, dim]``."""
        for name, value in conditions.items():
            emb = ops.add(emb, self.layers[f"of_{name}"](self.features(value)))
        return emb


def check_augment(layer: nn.Module, augment_labels: Tensor, dim: int) -> Tensor:
    """Return ``layer(augment_labels)`` after checking their shape ``[N, dim]``."""
    if augment_labels.ndim != 2 or augment_labels.shape[1] != dim:
        raise UserError(
            "network",
            f"augmentation labels of shape {tuple(augment_labels.shape)}",
            allowed=f"[N, {dim}]",
            remedy="set the network's augment_dim to the augmentation pipe's label size",
        )
    y: Tensor = layer(augment_labels)
    return y
