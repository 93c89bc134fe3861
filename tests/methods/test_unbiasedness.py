"""What docs/unbiasedness.md says, asserted: its script measures on a smaller quadrature here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "unbiasedness"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unbiasedness_measure", FOLDER / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def laboratory(script: ModuleType) -> Any:
    return script.Laboratory(order=6)


def test_the_quadrature_is_exact(laboratory: Any) -> None:
    assert laboratory.check_points() < 1e-13


def test_training_has_the_gradient_of_distillation(script: ModuleType, laboratory: Any) -> None:
    """With mu = 0, to first order in the step: slope -1; at 256 intervals within 2 %."""
    grids = (3, 4, 5)
    differences = [
        script.relative(laboratory.discrete("ct", k), laboratory.discrete("cd", k)) for k in grids
    ]
    assert script.slope([2**k for k in grids], differences) == pytest.approx(-1, abs=0.15)
    assert script.relative(laboratory.discrete("ct", 4), laboratory.discrete("cd", 4)) < 0.02


def test_a_lagging_target_has_not(script: ModuleType, laboratory: Any) -> None:
    """mu > 0: relative to the gradient of consistency it diverges as the grid becomes finer."""
    model, target = script.trained()
    assert 0.001 < script.distance(model, target) < 0.2
    behind = script.Laboratory(6, model)
    consistency = behind.continuous("distillation")
    grids = (3, 4, 5)
    without, lagging = (
        [script.relative(behind.discrete("ct", k, target=t), consistency) for k in grids]
        for t in (None, target)
    )
    assert script.slope([2**k for k in grids], without) == pytest.approx(-1, abs=0.15)
    assert script.slope([2**k for k in grids], lagging) == pytest.approx(1, abs=0.15)
    # Both with that target: they agree with each other all the same.
    for k in grids:
        ct, cd = (behind.discrete(kind, k, target=target) for kind in ("ct", "cd"))
        assert script.relative(ct, cd) < 0.1 * lagging[grids.index(k)]


def test_continuous_time_has_no_bias_until_it_is_normalised(
    script: ModuleType, laboratory: Any
) -> None:
    cct = [laboratory.continuous(form) for form in ("training", "distillation")]
    assert script.relative(*cct) < 1e-12
    difference = {
        name: script.relative(
            laboratory.trigflow("sct", tangent=name), laboratory.trigflow("scd", tangent=name)
        )
        for name in ("raw", "normalize")
    }
    assert difference["raw"] < 1e-12
    assert difference["normalize"] > 0.1


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    """Numbers, text and plots belong together: nobody edits the page by hand."""
    measured = json.loads((FOLDER / "measured.json").read_text(encoding="utf-8"))
    page = (FOLDER.parent / "unbiasedness.md").read_text(encoding="utf-8")
    assert page == script.page(measured)
    for name in ("ct-cd.svg", "target.svg"):
        assert f"unbiasedness/{name}" in page
        assert (FOLDER / name).read_text(encoding="utf-8").startswith("<?xml")
