"""Long work on the CPU is said once where the CPU was only what was left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmbench.cli.common import make_context
from cmbench.cli.options import ComputeOptions
from cmbench.sweep import sweep
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.missing_gpu import missing_gpu
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep


def said(context: Context, *asked: SweepRequest) -> list[str]:
    plans = [plan_sweep(context, request) for request in asked]
    lines = [missing_gpu(context, plan.runs, plan.cells, plan.done) for plan in plans]
    return [line for line in lines if line]


@pytest.fixture
def found(context: Context) -> Context:
    """The CPU, as what ``--device auto`` found."""
    return replace(context, device_found=True)


def test_what_the_readme_runs_on_a_cpu_is_silent(found: Context) -> None:
    methods = tuple(found.plugins.methods.specs)
    assert said(found, *(SweepRequest(methods, name) for name in ("digits", "gmm"))) == []


@pytest.mark.parametrize("recipe", ["paper", "demo"])
def test_a_recipe_made_for_a_gpu_is_one_line(found: Context, recipe: str) -> None:
    dataset = "cifar10" if recipe == "paper" else "cifar10-jpeg"
    (line,) = said(found, SweepRequest(("edm",), dataset, recipe))
    assert line.startswith("no GPU: torch ")
    assert f"training {dataset}/edm-{recipe}-s0-" in line
    assert line.endswith("or give --device cpu to run on the CPU without this warning")
    assert "\n" not in line


def test_what_is_missing_is_named(found: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, lacks in ((None, "is built without CUDA"), ("12.8", "finds no NVIDIA GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert lacks in said(found, SweepRequest(("edm",), "cifar10", "paper"))[0]


def test_a_device_that_was_named_or_is_a_gpu_is_silent(context: Context, found: Context) -> None:
    asked = SweepRequest(("edm",), "cifar10", "paper")
    assert said(context, asked) == []
    assert said(replace(found, device=torch.device("cuda")), asked) == []


@pytest.mark.parametrize(
    ("kimg", "samples", "what"),
    [
        (24_999, 64, ""),
        (25_000, 64, "training toys/toy-"),
        (1, 12_499_999, ""),
        (1, 12_500_000, "sampling toy-"),
    ],
)
def test_long_is_from_a_hundred_million_numbers(
    toys: Context, kimg: int, samples: int, what: str
) -> None:
    """A toy has four numbers; the sampling takes two evaluations."""
    asked = SweepRequest(
        ("toy",),
        "toys",
        nfes=(1, 2),
        overrides=(f"duration_kimg={kimg}",),
        sampling=SampleSettings(num_samples=samples),
    )
    lines = said(replace(toys, device_found=True), asked)
    assert [f", so {what}" in line for line in lines] == ([True] if what else [])


def test_finished_training_and_records_do_not_count(toys: Context) -> None:
    context = replace(toys, device_found=True)
    long = SweepRequest(("toy",), "toys", nfes=(1,), overrides=("duration_kimg=1e8",))
    assert len(said(context, long)) == 1
    plan = plan_sweep(context, long)
    folder = context.workspace.run(plan.runs[0].run_id)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    assert said(context, long) == []


def test_a_sweep_without_work_does_not_count(toys: Context) -> None:
    assert missing_gpu(replace(toys, device_found=True), [], [], set()) == ""


def test_an_imported_checkpoint_is_not_trained(toys: Context) -> None:
    run = plan_run(toys, "toy", "toys", None, 0, {"duration_kimg": 1e8})
    context = replace(toys, device_found=True)
    assert "training toys/toy-" in missing_gpu(context, [run], [], set())
    imported: Any = SimpleNamespace(table={})
    assert missing_gpu(context, [replace(run, imported=imported)], [], set()) == ""


def test_a_sweep_warns_before_it_opens_anything(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = replace(toys, device_found=True)
    asked = SweepRequest(("toy",), "toys", overrides=("duration_kimg=1e8",))

    def stop(*_: object) -> None:
        raise RuntimeError("opened")

    monkeypatch.setattr(sweep, "require_metrics", stop)
    with pytest.raises(RuntimeError, match="opened"):
        execute(context, plan_sweep(context, asked), Local())
    (line,) = context.reporter.warnings  # type: ignore[attr-defined]
    assert line.startswith("no GPU: ")


@pytest.mark.parametrize(("device", "found"), [("auto", True), ("cpu", False)])
def test_the_command_line_knows_how_the_device_was_chosen(
    tmp_path: Path, device: str, found: bool
) -> None:
    context = make_context(ComputeOptions(workspace_dir=str(tmp_path), device=device, quiet=True))
    assert context.device_found is found
