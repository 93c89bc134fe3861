"""Generators without noise levels, from pure noise, or that follow no probability flow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toy import Toy

from cmbench.errors import PluginError
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.method import Batch, Draws, Kit, Method, Nets, Progress, SamplingPlan
from cmbench.records.record import SamplingRecord, read_record, write_record
from cmbench.sweep.cells import measure_cell
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.training_run import obtain_run

TINY = {"width": 16, "blocks": 1, "embedding_dim": 8}


class OneStep(Method):
    """A generator that maps unit noise to images, whatever the noise level is called."""

    follows_probability_flow = False
    Config = MethodConfig
    sigmas: tuple[float, ...] = ()

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": kit.network()}

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        z = draws.normal("noise", batch.images)
        made = nets["model"](z, torch.zeros(len(z)), batch.labels)
        return (made - batch.images).square().flatten(1).sum(1)

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        return SamplingPlan(nfe, "one-step", self.sigmas)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        made: Tensor = nets["model"](noise, torch.zeros(len(noise)), labels)
        return made


class FromPureNoise(OneStep):
    sigmas = (math.inf,)


class Following(FromPureNoise):
    """Says that it follows the flow, from a level at which no flow starts."""

    follows_probability_flow = True


class FollowingFromEighty(Following):
    sigmas = (80.0,)


def measured(context: Context, method_class: type[Method], dataset: str = "gmm") -> Any:
    table = {"network": TINY, "duration_kimg": 0.064, "batch_size": 32, "teacher": None}
    recipe = plan_run(context, "edm", dataset, "smoke", 0, {"conditional": False})
    config = MethodConfig(
        **{
            **{k: v for k, v in recipe.table.items() if k in MethodConfig.model_fields},
            **table,
            "network": {**recipe.table["network"], **TINY},
        }
    )
    plan = replace(recipe, method_class=method_class, config=config)
    (cell,) = plan_cells(context, plan, [1], 0, SampleSettings(num_samples=64))
    assert not cell.broken, cell.broken
    return measure_cell(context, obtain_run(context, plan), cell)


@pytest.mark.parametrize(
    ("method_class", "flow", "sigmas"),
    [
        (OneStep, False, []),
        (FromPureNoise, False, ["inf"]),
        (Following, False, ["inf"]),
        (FollowingFromEighty, True, [80.0]),
    ],
)
def test_no_level_is_invented_and_no_flow_map_error_measured(
    toys: Context, tmp_path: Any, method_class: type[Method], flow: bool, sigmas: list[Any]
) -> None:
    record = measured(toys, method_class)
    assert record.status == "finished"
    assert ("flow-map-mean" in record.metrics) == flow
    assert record.metrics["fd-pixels"].value is not None
    assert json.loads(record.to_json())["sampling"]["sigmas"] == sigmas
    path = write_record(record, tmp_path)
    assert read_record(path) == record
    assert read_record(path).sampling.sigmas == [float(sigma) for sigma in sigmas]


@pytest.mark.parametrize(
    "sigmas", [(1.0, 2.0), (1.0, math.inf), (-1.0,), (0.0,), (math.nan,), (math.inf, math.inf)]
)
def test_levels_that_cannot_be_are_refused(toys: Context, sigmas: tuple[float, ...]) -> None:
    class Wrong(Toy):
        def plan_sampling(self, nfe: int, *_: Any, **__: Any) -> SamplingPlan:
            return SamplingPlan(nfe, "toy", sigmas)

    plan = replace(plan_run(toys, "toy", "toys", "demo", 0), method_class=Wrong)
    (cell,) = plan_cells(toys, plan, [1], 0, SampleSettings())
    assert "plan_sampling: gives noise levels" in cell.broken
    assert "descending positive ones, the first perhaps infinite, or none at all" in cell.broken
    assert PluginError.__name__ not in cell.broken


@pytest.mark.parametrize("sigma", [-math.inf, math.nan, 1e60, "high", None])
def test_records_hold_no_other_levels(sigma: Any) -> None:
    facts = {"nfe": 1, "seed": 0, "num_samples": 1, "protocol_samples": 1, "batch_size": 1}
    assert SamplingRecord(**facts, sigmas=[math.inf, 2.0]).sigmas == [math.inf, 2.0]
    with pytest.raises(ValidationError):
        SamplingRecord(**facts, sigmas=[sigma])
