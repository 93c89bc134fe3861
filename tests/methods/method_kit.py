"""Built-in methods on tiny networks and draws that a test has chosen, for the tests of this folder.

What every method must satisfy is checked by :mod:`cmbench.testing`; here is mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from cmbench.errors import Declined
from cmbench.plugin.manager import load_plugins
from cmbench.plugin.method import DataInfo, Method, SamplingPlan, Teacher
from cmbench.sweep.context import Context
from cmbench.testing.case import TINY, Case, Subject, nowhere, progress, stir

__all__ = ["TINY", "Case", "FixedDraws", "build", "context", "progress", "stir"]


@cache
def context() -> Context:
    """Return a context that writes nowhere."""
    return nowhere(load_plugins())


def build(
    name: str,
    dataset: str = "digits",
    *,
    conditional: bool = False,
    recipe: str = "smoke",
    **overrides: Any,
) -> Case:
    """Build a method from its recipe with a tiny network, stirred weights and stirred teacher."""
    subject = Subject(context(), name, dataset, recipe)
    return subject.case(conditional=conditional, **overrides)


def plan_or_reason(method: Method, nfe: int) -> SamplingPlan | str:
    """Return the plan of an NFE budget, or why the method declines it."""
    try:
        return method.plan_sampling(nfe)
    except Declined as reason:
        return str(reason)


@dataclass
class FixedDraws:
    """Draws that a test has chosen, by name."""

    values: Mapping[str, Tensor]

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return the chosen numbers."""
        return self.values[name].to(like).reshape(like.shape)

    uniform = normal


def data_of(shape: tuple[int, int, int], sigma_data: float = 0.5) -> DataInfo:
    """Return facts of unconditional data."""
    return DataInfo("test", shape, 0, sigma_data, bounded=False)


def exact_teacher(model: Any) -> Teacher:
    """Return a teacher without a network."""
    return Teacher("exact", model, None)
