"""Out of memory, in one line with the batch to try next, and what that does to the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from cmbench.errors import BrokenRunError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: torch has another one on the CPU than on a GPU.

    The error may be the cause of one that explains it.
    """
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def smaller_shard(share: int, shard: int) -> int | None:
    """Return the largest divisor of ``share`` that is at most half of ``shard``; None below 1."""
    return next((n for n in range(shard // 2, 0, -1) if share % n == 0), None)


@contextmanager
def _instead(explained: Callable[[], BrokenRunError]) -> Iterator[None]:
    """Raise ``explained()`` instead of an error that says that memory was short."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explained() from error


def memory_explained(
    device: torch.device, *, batch_size: int, processes: int, microbatch_size: int | None, nimg: int
) -> AbstractContextManager[None]:
    """Turn torch's out-of-memory error of a training step into one that names the next batch.

    How much the step lacked is unknown where it broke off, so the proposal halves the shard.

    Raises:
        BrokenRunError: instead of torch's.
    """

    def explained() -> BrokenRunError:
        share = batch_size // processes
        shard = min(microbatch_size or share, share)
        fewer = smaller_shard(share, shard)
        remedy = (
            f"set microbatch_size={fewer} (-o microbatch_size={fewer}): same batch, gradients "
            "accumulate"
            if fewer
            else "choose a smaller network or precision=bf16"
        )
        # The recipe, these options included, is the run's identity: nothing of it is resumed.
        return BrokenRunError(
            f"training on {device}",
            f"out of memory with {shard} images per pass after {nimg} images seen{_used(device)}",
            remedy=f"{remedy}, as a new run from the start; this run's last good "
            "checkpoint is kept, and can be continued with more memory or more processes",
        )

    return _instead(explained)


def sampling_memory_explained(
    device: torch.device, batch_size: int
) -> AbstractContextManager[None]:
    """Turn torch's out-of-memory error of sampling or measuring into one that names the next batch.

    Raises:
        BrokenRunError: instead of torch's.
    """

    def explained() -> BrokenRunError:
        fewer = batch_size // 2
        return BrokenRunError(
            f"sampling and measuring on {device}",
            f"out of memory with --batch-size {batch_size}{_used(device)}",
            remedy=f"add --batch-size {fewer}: nothing else changes, trained weights are kept"
            if fewer
            else "take a device with more memory; trained weights are kept",
        )

    return _instead(explained)


def building_memory_explained(name: str) -> AbstractContextManager[None]:
    """Turn torch's out-of-memory error of building a network into one line.

    Raises:
        BrokenRunError: instead of torch's.
    """
    return _instead(
        lambda: BrokenRunError(
            f"network {name!r}",
            "out of memory before it was built",
            remedy="choose a smaller network, for example with -o network.KEY=VALUE",
        )
    )


def _used(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f", {peak:.1f} of {total:.1f} GiB allocated"
