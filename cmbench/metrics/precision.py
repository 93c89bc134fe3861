"""Numerical housekeeping: no TF32 or autocast in features and distances; rows in blocks.

TF32 costs three digits of a feature and is on by default in places (cuDNN convolutions); none of
the usual libraries switches it off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def row_blocks(rows: Tensor, size: int) -> list[Tensor]:
    """Return views of at most ``size`` consecutive rows each."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Run float32 matrix products and convolutions in float32, and leave no autocast on."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
