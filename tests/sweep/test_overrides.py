"""What the user changed of a recipe: recorded as what differs, however it was written."""

from __future__ import annotations

from typing import Any

import pytest

from cmbench.samples.source import ReadOptions
from cmbench.sweep.cell_record import base_record
from cmbench.sweep.context import Context
from cmbench.sweep.opened_runs import open_run
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.training_run import obtain_run


@pytest.mark.parametrize(
    ("given", "overrides"),
    [
        ((), {}),
        (("optimizer.lr=2e-3", "batch_size=32"), {}),
        (("optimizer.lr=0.01",), {"optimizer.lr": 0.01}),
        (("optimizer.lr=1e-2", "batch_size=32"), {"optimizer.lr": 0.01}),
        (("network.width=32", "phases=2"), {"network.width": 32, "phases": 2}),
        (("network.name=unet-tiny",), {"network.name": "unet-tiny"}),
    ],
)
def test_overrides_are_what_differs_from_the_recipe(
    toys: Context, given: tuple[str, ...], overrides: dict[str, Any]
) -> None:
    run = plan_run(toys, "toy", "toys", "demo", 0, given)
    assert run.overrides == overrides


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        (SampleSettings(), {}),
        (SampleSettings(sampler="toy"), {}),
        (SampleSettings(sampler="other"), {"sampler": "other"}),
        (SampleSettings(ema="raw"), {"ema": "raw"}),
        (SampleSettings(sigmas=(3.0, 2.0)), {"sigmas": [3.0, 2.0]}),
        (SampleSettings(sigmas=(3.0, 2.0), tuned={"tries": 1}), {}),
    ],
)
def test_sampling_overrides_are_what_differs_from_the_usual(
    toys: Context, settings: SampleSettings, overrides: dict[str, Any]
) -> None:
    run = plan_run(toys, "toy", "toys", "demo", 0)
    (cell,) = plan_cells(toys, run, [2], 0, settings)
    record = base_record(toys, cell, "skipped")
    assert record.sampling.overrides == overrides
    assert record.training.overrides == {}
    usual = cell.sampling
    assert usual is not None
    (same,) = plan_cells(toys, run, [2], 0, SampleSettings(sigmas=tuple(usual.sigmas)))
    if not overrides and settings.tuned is None:
        assert same.overrides == {}, "noise levels that the method would choose anyway"


def test_a_run_keeps_its_overrides_for_those_who_open_it(toys: Context) -> None:
    run = plan_run(toys, "toy", "toys", "demo", 0, ("optimizer.lr=0.01",))
    trained = obtain_run(toys, run)
    opened = open_run(toys, trained.folder, 1, ReadOptions(limit=4))
    assert opened.cell.run.overrides == {"optimizer.lr": 0.01}
