"""``benchmarks/gpu.py``: its parts run on a tiny problem, and batches are cut until they fit."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cmbench.training.memory import memory_explained

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
METHODS = {"edm", "ict", "ect", "cd", "sct", "scd"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("explained", [True, False])
def test_a_shard_is_halved_until_it_fits(script: ModuleType, explained: bool) -> None:
    tried: list[int] = []

    def work(shard: int) -> str:
        tried.append(shard)
        if shard <= 128:
            return "fits"
        error = torch.OutOfMemoryError("tried 2 GiB")
        if not explained:
            raise error
        device = torch.device("cpu")
        with memory_explained(device, batch_size=512, processes=1, microbatch_size=shard, nimg=0):
            raise error
        return "never"

    bench: Any = SimpleNamespace(free=lambda: None)
    assert script.with_fitting_shard(bench, 512, work) == "fits"
    assert tried == [512, 256, 128]


def test_other_errors_are_not_taken_for_a_lack_of_memory(script: ModuleType) -> None:
    bench: Any = SimpleNamespace(free=lambda: None)

    def work(shard: int) -> None:
        raise RuntimeError(f"broken at {shard}")

    with pytest.raises(RuntimeError, match="broken at 512"):
        script.with_fitting_shard(bench, 512, work)


@pytest.mark.slow
def test_every_part_and_method_runs(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--cpu-smoke",
            "--no-compile",
            "--out",
            str(out),
            "--parts",
            "train,table,sampling,profile",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    train = found["train"]["smoke"]
    assert set(train) == set(found["profile"]["smoke"]) == METHODS
    for figures in train.values():
        assert figures["images_per_s"] > 0
        assert figures["utilisation"] > 0
        assert figures["step_over_edm"] > 0
    assert train["edm"]["step_over_edm"] == 1
    # Steps of the algorithms, in forward passes: 3 of edm, 4 of ict, 6 of cd, 4 of sct, 5 of scd.
    cost = {
        name: train[name]["gflops_per_image"] / train["edm"]["gflops_per_image"] for name in METHODS
    }
    assert cost["edm"] < cost["sct"] < cost["scd"] < cost["cd"] < 2.5
    assert next(v["speed_up"] for v in found["table"]["smoke"].values()) == 1
    assert set(found["sampling"]["smoke"]["bf16"]) == {"nfe-1", "nfe-2", "nfe-4"}
    assert "train, smoke: images/s | utilisation" in done.stdout
