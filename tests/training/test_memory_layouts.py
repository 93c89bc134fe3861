"""The layout that is asked for is the one a network gets, whatever it had."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from cmbench.networks.counted import memory_layout, to_device
from cmbench.sweep import runs

CPU = torch.device("cpu")
LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_place_sets_the_layout_either_way(before: bool, asked: bool) -> None:
    module = to_device(nn.Conv2d(3, 4, 3), CPU, channels_last=before)
    assert memory_layout(module) == LAYOUTS[before]
    assert memory_layout(to_device(module, CPU, channels_last=asked)) == LAYOUTS[asked]


@pytest.fixture
def gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_variant_of_the_benchmark_trains_in_its_layout(
    gpu_benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks are built as on a GPU: channels-last before the benchmark sees them."""
    monkeypatch.setattr(
        runs,
        "to_device",
        lambda module, device, channels_last: to_device(module, device, channels_last=True),
    )
    bench = gpu_benchmark.Bench(Namespace(cpu_smoke=True, out=None, seconds=1e6))
    case = gpu_benchmark.CASES["smoke"]
    for variant in gpu_benchmark.TABLE:
        training = bench.training("ect", case, 2, variant)
        expected = LAYOUTS[variant.channels_last]
        assert memory_layout(training.state.modules["model"]) == expected, variant.label
        teacher = bench.teacher(case, variant, "edm")
        assert memory_layout(teacher.network) == expected, variant.label
