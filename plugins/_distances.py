"""The distance of two images, for methods in which it can be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from cmbench.diffusion.distances import huber_constant, l1_mean, l2_mean, pseudo_huber
from cmbench.plugin.config import MethodConfig, Positive
from cmbench.plugin.method import Method, Nets, Phase

if TYPE_CHECKING:
    from cmbench_plugins._lpips import LPIPS


class LPIPSConfig(MethodConfig):
    """Where the learned distance comes from."""

    lpips_weights: str | None = Field(
        None, description="folder with the weights of lpips; torch hub's if not given"
    )
    lpips_pooling: Literal["max", "average"] = Field(
        "max", description="pooling in lpips: as published, or as the ImageNet-64 release of CM"
    )


class LPIPSMethod(Method):
    """A method that may use the learned distance."""

    config: LPIPSConfig

    @cached_property
    def lpips(self) -> LPIPS:
        """The learned distance; raises ``MissingError`` if its weights are not at hand."""
        from cmbench_plugins._lpips import LPIPS  # on this path only: torchvision is slow

        return LPIPS.load(self.config.lpips_weights, self.config.lpips_pooling)


class MetricConfig(LPIPSConfig):
    """The choice of a distance."""

    metric: Literal["l2", "l1", "pseudo-huber", "lpips"] = Field(
        "l2", description="distance of the two outputs"
    )
    huber_c: Positive | None = Field(
        None, description="c of pseudo-huber; 0.00054 sqrt(values of an image) if not given"
    )


class MetricMethod(LPIPSMethod):
    """A method whose distance can be chosen."""

    config: MetricConfig

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """One phase; LPIPS' weights must be at hand before it starts (sampling needs none)."""
        if self.config.metric == "lpips":
            assert self.lpips is not None
        return super().phases(nets)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """``d(a, b)`` per image ``[N]``: a mean over values for l2 and l1."""
        c = self.config
        if c.metric == "lpips":
            distance: Tensor = self.lpips(a, b)
            return distance
        if c.metric == "l1":
            return l1_mean(a, b)
        if c.metric == "pseudo-huber":
            return pseudo_huber(a, b, c.huber_c or huber_constant(a[0].numel()))
        return l2_mean(a, b)
