"""Out of memory: the line names a batch that divides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fit import BATCH, phase, train
from torch import Tensor

from cmbench.errors import BrokenRunError
from cmbench.training.memory import smaller_shard


def exhausted(*_: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("microbatch_size", "line"),
    [
        (None, "with 8 images a pass after 0 images seen; set microbatch_size=4"),
        (2, "with 2 images a pass after 0 images seen; set microbatch_size=1"),
        (1, "with 1 images a pass after 0 images seen; choose a smaller network"),
    ],
)
def test_line_names_the_next_batch(microbatch_size: int | None, line: str) -> None:
    assert BATCH == 8
    with pytest.raises(BrokenRunError, match=f"^training on cpu: out of memory {line}") as caught:
        train(phase(exhausted), microbatch_size=microbatch_size)
    assert "\n" not in str(caught.value)
    assert "last good checkpoint is kept" in str(caught.value)


@pytest.mark.parametrize(
    ("share", "shard", "expected"),
    [(512, 512, 256), (48, 16, 8), (9, 9, 3), (7, 7, 1), (7, 1, None)],
)
def test_smaller_shard_divides(share: int, shard: int, expected: int | None) -> None:
    assert smaller_shard(share, shard) == expected
