"""Exponential moving averages of the weights, updated with one fused call per step.

Half-life in images with ramp-up: EDM, ``training_loop.py`` (as a formula): beta = 0.5^(B / H),
H = min(halflife, ratio * images seen before the step). Power function: EDM2 (2312.02696) eq. 4 and
Algorithm 2: beta_t = (1 - 1/t)^(gamma + 1), where gamma solves the width equation for sigma_rel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from cmbench.plugin.config import EMAConfig


@cache
def power_exponent(sigma_rel: float) -> float:
    """Return gamma for a relative width: (g+1) / ((g+2)^2 (g+3)) = sigma_rel^2 (EDM2 eq. 126-127).

    Raises:
        ValueError: if no positive gamma has that width (0 < sigma_rel < 0.28).
    """
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    gamma = float(np.real(roots).max())
    if not 0 < sigma_rel < 0.29 or gamma < 0:
        raise ValueError(f"sigma_rel {sigma_rel} has no power-function average; allowed: 0 to 0.28")
    return gamma


def ema_decay(config: EMAConfig, *, batch_size: int, nimg: int) -> float:
    """Return the decay of the step that ends at ``nimg`` images (of the phase)."""
    if config.decay is not None:
        return config.decay
    if config.sigma_rel is not None:
        step = max(nimg / batch_size, 1.0)
        return float((1 - 1 / step) ** (power_exponent(config.sigma_rel) + 1))
    assert config.halflife_kimg is not None
    halflife = config.halflife_kimg * 1000
    if config.rampup_ratio is not None:
        # EDM's loop counts a step's images after it has averaged; EDM2's power function before.
        halflife = min(halflife, (nimg - batch_size) * config.rampup_ratio)
    return float(0.5 ** (batch_size / max(halflife, 1e-8)))


class WeightAverage:
    """One average of a module's parameters; buffers are copied.

    ``slices`` maps the parameters to the tensors that are averaged: this process's part of each,
    where a network is split.
    """

    def __init__(
        self,
        config: EMAConfig,
        module: nn.Module,
        slices: Callable[[list[nn.Parameter]], list[nn.Parameter]] = list,
    ) -> None:
        self.config = config
        named = dict(module.named_parameters(remove_duplicate=False))  # tied weights: every name
        parameters = list(dict.fromkeys(named.values()))
        self._source: list[Tensor] = list(slices(parameters))
        self.average = [p.detach().clone() for p in self._source]
        place = {id(p): index for index, p in enumerate(parameters)}
        self._places = {name: place[id(p)] for name, p in named.items()}
        kept = module.state_dict(keep_vars=True)
        self._buffers = {k: v for k, v in kept.items() if k not in named}

    @torch.no_grad()
    def update(self, *, batch_size: int, nimg: int) -> None:
        """Move the average towards the current weights."""
        decay = ema_decay(self.config, batch_size=batch_size, nimg=nimg)
        torch._foreach_lerp_(self.average, self._source, 1 - decay)

    def parameters(self) -> dict[str, Tensor]:
        """Return the averaged parameters, under the module's names."""
        return {n: self.average[i] for n, i in self._places.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged parameters and the module's buffers, under the module's names."""
        return self.parameters() | self._buffers

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the averaged parameters."""
        for name, index in self._places.items():
            self.average[index].copy_(tensors[name])
