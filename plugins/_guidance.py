"""Classifier-free guidance whose strength the student receives as a condition of its network."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.models import DiffusionModel
from cmbench.errors import UserError
from cmbench.plugin.config import MethodConfig, NonNegative, Options
from cmbench.plugin.method import Draws

#: The condition by which a network receives the strength of guidance.
GUIDANCE = "guidance"
#: What a network receives beside the noise level, ``[N]`` by name.
Conditions = Mapping[str, Tensor]


class GuidanceConfig(Options):
    """Strengths of classifier-free guidance, ``v = v_none + s (v_class - v_none)``; 1 is none."""

    low: NonNegative = Field(1.0, description="smallest strength s in training (a pure number)")
    high: NonNegative = Field(2.0, description="largest strength s in training (a pure number)")
    sampled: NonNegative = Field(1.0, description="strength s of the images (a pure number)")

    def drawn(self, draws: Draws, like: Tensor) -> Conditions:
        """Return a strength for each image, uniform between the bounds, as ``like`` ``[N]``."""
        return {GUIDANCE: self.low + (self.high - self.low) * draws.uniform(GUIDANCE, like)}


def require_guidable(config: MethodConfig, guidance: GuidanceConfig | None) -> None:
    """Raise ``UserError`` for guidance without classes, or without the network's condition."""
    conditions = config.network.get("conditions", ())
    if guidance is not None and not (config.conditional and GUIDANCE in conditions):
        raise UserError(
            "recipe",
            f"guidance with conditional = {str(config.conditional).lower()} and "
            f"network.conditions = {list(conditions)}",
            allowed=f"conditional = true and the condition {GUIDANCE!r}",
            remedy=f"set conditional=true and network.conditions=['{GUIDANCE}'], or leave "
            "guidance out",
        )


def given(told: Conditions) -> dict[str, Conditions]:
    """Return the network's arguments: none for none, which third-party networks need not take."""
    return {"conditions": told} if told else {}


def guided_velocity(
    model: DiffusionModel, x_t: Tensor, t: Tensor, labels: Tensor | None, told: Conditions
) -> Tensor:
    """Return ``v_none + s (v_class - v_none)`` ``[N, C, H, W]``; ``v_class`` without a strength.

    TrigFlow frame, ``t [N]``; ``v_none`` is the model's velocity without a class (Ho & Salimans
    2022, arXiv:2207.12598).
    """
    velocity = model.velocity(x_t, t, labels)
    if not told:
        return velocity
    free = model.velocity(x_t, t, None)
    return free + append_dims(told[GUIDANCE], x_t) * (velocity - free)
