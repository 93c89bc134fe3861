"""What the data that a model generates for a phase cost, before any of it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.networks.counted import CountedNetwork
from cmbench.networks.flops import flop_counter
from cmbench.plugin.method import GeneratedData, Method, Nets, Phase
from cmbench.sweep.plans import RunPlan

#: Pairs of more evaluations are counted by one of them: fake tensors take seconds per hundred.
_WHOLE_UP_TO = 8


@dataclass(frozen=True)
class GenerationCost:
    """Estimates of the data that a model generates for a phase; None where it is not known."""

    phase: str
    pairs: int
    bytes: int
    evaluations: int | None = None
    flops_per_pair: float | None = None
    device_hours: float | None = None
    note: str = ""

    def at(self, rate: float, note: str = "") -> GenerationCost:
        """Return the same with the hours that it takes at ``rate`` FLOP/s."""
        if self.flops_per_pair is None:
            return self
        hours = self.flops_per_pair * self.pairs / rate / 3600
        return replace(self, device_hours=hours, note=note)


def generation_cost(
    plan: RunPlan, method: Method, modules: dict[str, nn.Module], phase: Phase
) -> GenerationCost:
    """Return the cost of a phase's generated data, without hours; modules are on fake tensors."""
    wanted = phase.generated
    assert wanted is not None
    nets = {name: CountedNetwork(m, plan.config.precision) for name, m in modules.items()}
    noise = torch.empty(1, *method.data.data_shape)
    labels = torch.zeros(1, dtype=torch.int64) if plan.config.conditional else None
    many = wanted.nfe is not None and wanted.nfe > _WHOLE_UP_TO
    flops = None if many else _flops(lambda: wanted.make(nets, noise, labels))
    if flops is None and wanted.nfe is not None:
        once = _flops(lambda: _evaluated_once(method, nets, wanted, noise, labels))
        flops = None if once is None else wanted.nfe * once
    evaluations = None if wanted.nfe is None else wanted.nfe * wanted.count
    values = wanted.count * wanted.states * math.prod(method.data.data_shape)
    stored = values * getattr(torch, wanted.dtype).itemsize
    return GenerationCost(phase.name, wanted.count, stored, evaluations, flops)


def _flops(work: Callable[[], Any]) -> float | None:
    """Count the FLOPs of a call; None if it cannot be made on fake tensors.

    A solver that looks at a noise level, or at its images, cannot.
    """
    try:
        with flop_counter() as counter, torch.no_grad():
            work()
    except Exception:  # whatever a fake tensor, or a method, raises
        return None
    return float(counter.get_total_flops())


def _evaluated_once(
    method: Method, nets: Nets, wanted: GeneratedData, noise: Tensor, labels: Tensor | None
) -> None:
    """Call what makes the data on one image."""
    sigma = torch.ones(1)
    if wanted.made_by:
        nets[wanted.made_by[0]](noise, sigma, labels)
    else:
        method.distilled().denoise(noise, sigma, labels)
