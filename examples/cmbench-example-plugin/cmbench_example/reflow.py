"""Reflow: a second rectified flow, trained on pairs that the first one has made.

Liu et al. 2022, "Flow Straight and Fast", arXiv:2209.03003, Algorithm 1. Two phases: a flow from
independent noise to data, then one from the first flow's noise to its images, whose paths are
straighter. No teacher. One graded network call per training step; the pairs cost ``pair_nfe`` each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pydantic import Field
from torch import Tensor, nn

from cmbench.plugin.method import Draws, GeneratedData, Kit, Nets, Phase, PhaseStart
from cmbench_example.flow import Flow, FlowConfig


class ReflowConfig(FlowConfig):
    """Hyper-parameters; ``duration_kimg`` is the length of each phase."""

    pairs: int = Field(50_000, ge=1, description="pairs of noise and image for the second phase")
    pair_nfe: int = Field(32, ge=1, description="Euler steps that make an image of a pair")


class Reflow(Flow):
    """A rectified flow, rectified once more."""

    Config = ReflowConfig
    config: ReflowConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The flow, and a copy of the first phase's average, which makes the pairs."""
        return {"model": kit.network(), "first": kit.network()}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """The first flow is a generator of its own: the variant ``flow``."""
        c = self.config
        images = round(c.duration_kimg * 1000)
        solver = f"euler from {c.sigma_max:g}"
        pairs = GeneratedData(c.pairs, self.make, solver, c.pair_nfe, made_by=("first",))
        return [
            Phase("flow", images, self.objectives(nets), c.ema, export="flow"),
            Phase(
                "reflow",
                images,
                self.objectives(nets),
                c.ema,
                start=self.keep_first,
                generated=pairs,
            ),
        ]

    def keep_first(self, start: PhaseStart) -> None:
        """The second flow goes on from the first one's average."""
        for module in ("first", "model"):
            start[module].load_state_dict(start.averaged("model"))

    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Return the first flow's images; Euler steps draw nothing."""
        plan, nothing = self.plan_sampling(self.config.pair_nfe), cast(Draws, None)
        return self.sample({"model": nets["first"]}, noise, labels, plan, nothing)
