"""``benchmarks/distillers.py``: each of its runs for two steps, and its distance."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "distillers.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("distillers_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_run_trains_and_samples(script: Any) -> None:
    for method, iterations, options in script.RUNS.values():
        assert iterations >= 1000
        made, nets = script.trained(method, 2, pretrained=False, **options)
        assert math.isfinite(script.wasserstein(made, nets, count=100))


def test_distance_of_exact_samples_and_of_shifted_ones(script: Any) -> None:
    class Exact:
        def __init__(self, shift: float) -> None:
            self.shift = shift

        def plan_sampling(self, nfe: int) -> None:
            """One step."""

        def sample(self, nets: Any, noise: torch.Tensor, *_: Any) -> torch.Tensor:
            u = torch.special.ndtr(noise.double().flatten())
            return (script.quantiles(u) + self.shift).reshape(noise.shape)

    assert script.wasserstein(Exact(0.0), {}) < 0.005
    assert script.wasserstein(Exact(0.1), {}) == pytest.approx(0.1, abs=0.005)
