"""``mlp``: a residual multilayer perceptron for 2-D mixtures and very small images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from cmbench.networks import ops
from cmbench.networks.base import Network
from cmbench.networks.config import MLPConfig
from cmbench.networks.dual import Value
from cmbench.networks.embedding import NoiseLabelEmbedding
from cmbench.networks.layers import Init, Linear
from cmbench.networks.temporal import temporal_mixing


class MLPBlock(nn.Module):
    """``x + W1 dropout(silu(W0 silu(x) * (1 + s) + b))`` with s, b from the embedding."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        width, embedding_dim = config.width, config.embedding_dim
        hidden = width * config.expansion
        self.layer0 = Linear(width, hidden)
        self.affine = Linear(embedding_dim, 2 * hidden)
        self.layer1 = Linear(hidden, width, init=Init(gain=0.3))
        self.temporal = temporal_mixing(config, width)

    def forward(self, x: Value, emb: Value) -> Value:
        """Map ``[N, width]`` to the same shape."""
        factor, shift = ops.halves(self.affine(emb))
        h = ops.mul(self.layer0(ops.silu(x)), ops.add_constant(factor, 1.0))
        h = ops.dropout(ops.silu(ops.add(h, shift)), self.dropout, self.training)
        y = ops.residual(x, self.layer1(h), math.sqrt(0.5))
        return y if self.temporal is None else self.temporal(y)


class MLP(Network):
    """Works on flattened data: any ``data_shape``, no notion of pixels' places."""

    Config: ClassVar[type[MLPConfig]] = MLPConfig
    config: MLPConfig

    def __init__(
        self, config: MLPConfig, data_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__(config, data_shape, num_classes)
        features = math.prod(data_shape)
        self.embedding = NoiseLabelEmbedding(
            config, num_classes, inputs=config.embedding_dim, outputs=config.embedding_dim
        )
        self.layer_in = Linear(features, config.width)
        self.blocks = nn.ModuleList(MLPBlock(config) for _ in range(config.blocks))
        self.layer_out = Linear(config.width, features, init=Init(gain=0.0))

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
        h: Value = self.layer_in(ops.linear_map(lambda v: v.flatten(1), x))
        for block in self.blocks:
            h = block(h, emb)
        shape = x.shape
        return ops.linear_map(lambda v: v.view(shape), self.layer_out(ops.silu(h)))
