"""Out of memory: the line names a batch that divides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import BATCH, phase, train
from torch import Tensor

from cmbench.errors import BrokenRunError
from cmbench.sweep import scored, sweep
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.scored_record import ScoreRequest
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep
from cmbench.sweep.training_run import obtain_run
from cmbench.training.memory import smaller_shard


def exhausted(*_: Any, **__: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("microbatch_size", "line"),
    [
        (None, "with 8 images per pass after 0 images seen; set microbatch_size=4"),
        (2, "with 2 images per pass after 0 images seen; set microbatch_size=1"),
        (1, "with 1 images per pass after 0 images seen; choose a smaller network"),
    ],
)
def test_line_names_the_next_batch(microbatch_size: int | None, line: str) -> None:
    assert BATCH == 8
    with pytest.raises(BrokenRunError, match=f"^training on cpu: out of memory {line}") as caught:
        train(phase(exhausted), microbatch_size=microbatch_size)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(
        ", as a new run from the start; this run's last good checkpoint is kept, and can be "
        "continued with more memory or more processes"
    )


def test_memory_that_runs_out_behind_the_loss_is_explained_too() -> None:
    def after_step(nets: Any, progress: Any) -> None:
        exhausted()

    with pytest.raises(BrokenRunError, match="out of memory with 8 images per pass after 0 images"):
        train(phase(after_step=after_step))


@pytest.mark.parametrize(
    ("batch_size", "remedy"), [(5, "add --batch-size 2: nothing else"), (1, "take a device with")]
)
def test_sampling_names_the_next_batch(toys: Context, batch_size: int, remedy: str) -> None:
    asked = SweepRequest(
        ("toy",), "toys", nfes=(1,), sampling=SampleSettings(16, batch_size=batch_size)
    )
    plan = plan_sweep(toys, asked)
    obtain_run(toys, plan.runs[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "measure_cell", exhausted)
        (record,) = execute(toys, plan, Local())
    assert record.status == "failed"
    assert record.reason.startswith(
        f"sampling and measuring on cpu: out of memory with --batch-size {batch_size}; {remedy}"
    )
    smaller = SweepRequest(("toy",), "toys", nfes=(1,), sampling=SampleSettings(16, batch_size=2))
    (again,) = execute(toys, plan_sweep(toys, smaller), Local())
    assert (again.status, again.cell) == ("finished", record.cell), "the same cell"


def test_scoring_names_the_next_batch(
    toys: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "images.npy", np.zeros((8, 8, 8, 1), np.uint8))
    monkeypatch.setattr(scored, "measure", exhausted)
    request = ScoreRequest(str(tmp_path / "images.npy"), dataset="digits")
    with pytest.raises(BrokenRunError, match=r"--batch-size 250; add --batch-size 125: nothing"):
        scored.score(toys, request)


@pytest.mark.parametrize(
    ("share", "shard", "expected"),
    [(512, 512, 256), (48, 16, 8), (9, 9, 3), (7, 7, 1), (7, 1, None)],
)
def test_smaller_shard_divides(share: int, shard: int, expected: int | None) -> None:
    assert smaller_shard(share, shard) == expected
