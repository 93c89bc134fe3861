"""Numerical housekeeping: no TF32 or autocast in features and distances; rows in blocks.

TF32 costs three digits of a feature and is on by default in places (cuDNN convolutions); none of
the usual libraries switches it off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def row_blocks(rows: Tensor, size: int) -> list[Tensor]:
    """Return views of at most ``size`` consecutive rows each."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Run float32 matrix products and convolutions in float32, and leave no autocast on.

    Whichever of torch's interfaces allowed less (``allow_tf32``, the matmul precision,
    ``fp32_precision`` of everything, a backend or an operation), its settings are as before
    afterwards.
    """
    operations = _operations()
    before = [operation.fp32_precision for operation in operations]
    legacy = _legacy_settings()
    try:
        if legacy is not None:  # keeps the older flags readable while this is on
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        for operation in operations:
            if operation.fp32_precision not in ("ieee", "none"):
                operation.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy[0])
            torch.backends.cudnn.allow_tf32 = legacy[1]
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = "none"  # which means: as its backend
            if operation.fp32_precision != precision:
                operation.fp32_precision = precision


def _operations() -> list[Any]:
    """Return torch's settings of single operations."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    found: list[Any] = [cuda.matmul]
    for backend in (cudnn, mkldnn):
        names = ("conv", "rnn") if backend is cudnn else ("matmul", "conv", "rnn")
        found += [getattr(backend, name) for name in names if hasattr(backend, name)]
    return [operation for operation in found if hasattr(operation, "fp32_precision")]


def _legacy_settings() -> tuple[str, bool] | None:
    """Return matmul precision and cuDNN's flag; None where newer settings contradict them."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch refuses to read one interface after the other was used
        return None
