"""The kit that a method builds its modules with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cmbench.errors import UserError
from cmbench.plugin.method import DataInfo, Teacher
from cmbench.seeds import derive_seed
from cmbench.sweep.context import Context
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.validation import validate


@contextmanager
def seeded(*names: int | str) -> Iterator[None]:
    """Draw torch's random numbers on the CPU from a named seed, then go on where they were."""
    before = torch.get_rng_state()
    torch.manual_seed(derive_seed(*names))
    try:
        yield
    finally:
        torch.set_rng_state(before)


class TrainingKit:
    """Builds networks as the recipe says (see :class:`cmbench.plugin.method.Kit`)."""

    def __init__(
        self, context: Context, plan: RunPlan, data: DataInfo, teacher: Teacher | None
    ) -> None:
        self.context, self.plan, self.data, self.teacher = context, plan, data, teacher
        self._built = 0

    def network(self, *, channel_copies: int = 1, **overrides: Any) -> nn.Module:
        """Build a network with initial weights from (seed, "weights", how many were built).

        ``channel_copies`` multiplies its input and output channels.
        """
        channels, height, width = self.data.data_shape
        table = {**self.plan.config.network, **overrides}
        name = table.pop("name")
        network_class: Any = self.context.plugins.networks.load(name)
        config = validate(network_class.Config, table, f"network {name!r}")
        shape = (channels * channel_copies, height, width)
        with seeded(self.plan.seed, "weights", self._built):
            network: nn.Module = network_class(config, shape, self.data.num_classes)
        self._built += 1
        return network

    def student_of(
        self, teacher: Teacher, *, channel_copies: int = 1, **overrides: Any
    ) -> nn.Module:
        """Build a network and copy the teacher's weights into it."""
        network = self.network(channel_copies=channel_copies, **overrides)
        if teacher.network is None:
            return network
        state = teacher.network.state_dict()
        ours = {k: tuple(v.shape) for k, v in network.state_dict().items()}
        theirs = {k: tuple(v.shape) for k, v in state.items()}
        if ours != theirs:
            names = sorted(ours.keys() | theirs.keys())
            differing = [name for name in names if ours.get(name) != theirs.get(name)]
            raise UserError(
                f"run {self.plan.run_id}",
                f"its network differs from teacher {teacher.name}'s in {len(differing)} tensors "
                f"(first: {differing[0]})",
                allowed="the teacher's architecture and classes",
                remedy="give both recipes the same network table",
            )
        network.load_state_dict(state)
        return network
