"""Metrics beside the dataset's own: measured in cells of their own, refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from toy import TOYS

from cmbench.errors import UserError
from cmbench.records.record import Record
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.reproducing import find_cell, find_run
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep

TINY = {
    "network": {"channels": 8, "blocks": 1},
    "duration_kimg": 0.064,
    "batch_size": 32,
    "conditional": False,
}


def run(context: Context, *metrics: str, dataset: str = "toys", **options: Any) -> Record:
    method, recipe = ("toy", "demo") if dataset == "toys" else ("edm", "smoke")
    settings = SampleSettings(num_samples=64, metrics=metrics)
    asked = SweepRequest((method,), dataset, recipe, (1,), overrides=options, sampling=settings)
    (record,) = execute(context, plan_sweep(context, asked), Local())
    assert record.status == "finished", record.reason
    return record


def test_metrics_of_the_datasets_extractor_join_its_own(toys: Context) -> None:
    plain, more = run(toys), run(toys, "precision", "recall")
    assert set(more.metrics) == {*TOYS.metrics, "precision", "recall"}
    assert more.cell != plain.cell
    assert more.rank_metric == plain.rank_metric
    for name, value in plain.metrics.items():
        assert more.metrics[name] == value
    assert run(toys, "recall", "precision").cell == more.cell
    assert run(toys, *TOYS.metrics) == plain, "the dataset's own are no others"


def test_metrics_of_another_extractor_are_measured_in_the_same_pass(toys: Context) -> None:
    plain, more = (run(toys, *m, dataset="digits", **TINY) for m in ((), ("fd-pixels",)))
    assert "fd-pixels" not in plain.metrics
    assert set(more.metrics) == {*plain.metrics, "fd-pixels"}
    assert "pixels" in more.metrics["fd-pixels"].key
    for name, value in plain.metrics.items():
        assert more.metrics[name] == value
    assert more.copies == plain.copies
    assert more.dataset == plain.dataset


@pytest.mark.parametrize("name", ["no-such", "flow-map-mean"])
def test_metrics_that_cannot_be_are_refused_before_any_work(toys: Context, name: str) -> None:
    with pytest.raises(UserError, match=name):
        run(toys, name)
    assert not toys.workspace.root.exists()


def test_a_record_is_made_again_with_all_its_metrics(toys: Context) -> None:
    record = run(toys, "precision")
    cell = find_cell(toys, find_run(toys, record).plan, record)
    assert (cell.metrics, cell.cell) == (("precision",), record.cell)
    renamed = record.metrics | {"gone": replace_key(record)}
    older = record.model_copy(update={"metrics": renamed})
    assert find_cell(toys, find_run(toys, older).plan, older).metrics == ("precision",)


def replace_key(record: Record) -> Any:
    return record.metrics["precision"].model_copy(update={"key": "gone:v1"})


def test_the_verb_adds_columns(cmbench_with_toys: Callable[..., Any], workspace: Workspace) -> None:
    done = cmbench_with_toys(
        "run", "-m", "toy", "-d", "toys", "--nfe", "1", "--metrics", "precision", "--no-report"
    )
    assert done.code == 0, done.err
    heading = done.out.splitlines()[0].split()
    assert heading[3:5] == ["fd-pixels", "precision"]
    again = cmbench_with_toys(
        "run", "-m", "toy", "-d", "toys", "--nfe", "1", "--metrics", "precision", "--no-report"
    )
    assert again.out == done.out
    refused = cmbench_with_toys(
        "run", "-m", "toy", "-d", "toys", "--metrics", "precison", "--dry-run"
    )
    assert (refused.code, "precison" in refused.err) == (2, True)
