"""Out of memory, in one line with the batch to try next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cmbench.errors import BrokenRunError


def smaller_shard(share: int, shard: int) -> int | None:
    """Return the largest divisor of ``share`` that is at most half of ``shard``; None below 1."""
    return next((n for n in range(shard // 2, 0, -1) if share % n == 0), None)


@contextmanager
def memory_explained(
    device: torch.device, *, batch_size: int, processes: int, microbatch_size: int | None, nimg: int
) -> Iterator[None]:
    """Turn torch's out-of-memory error of a training step into one that names the next batch.

    How much the step lacked is unknown where it broke off, so the proposal halves the shard.

    Raises:
        BrokenRunError: instead of ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = batch_size // processes
        shard = min(microbatch_size or share, share)
        fewer = smaller_shard(share, shard)
        remedy = (
            f"set microbatch_size={fewer} (-o microbatch_size={fewer}): same batch, gradients "
            "accumulate" if fewer else "choose a smaller network, precision=bf16 or more memory"
        )
        used = ""
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            total = torch.cuda.get_device_properties(device).total_memory / 2**30
            used = f", {peak:.1f} of {total:.1f} GiB allocated"
        raise BrokenRunError(
            f"training on {device}",
            f"out of memory with {shard} images a pass after {nimg} images seen{used}",
            remedy=f"{remedy}; the last good checkpoint is kept",
        ) from error
