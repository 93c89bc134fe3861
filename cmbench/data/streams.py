"""The order in which a finite dataset is seen: endless, shuffled again every epoch, stateless.

Image ``k`` of the training stream is ``perm_e[k % size]`` with ``e = k // size``. The permutation
of epoch ``e`` and the mirror bits depend on names only, so a batch depends on (seed, position) and
never on the batch size, the number of processes or what was read before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmbench.seeds import derive_seed

#: Epochs whose order is kept: a batch may straddle two, and a prefetcher looks one ahead.
_EPOCHS_KEPT = 3


def _raw(count: int, *names: int | str) -> npt.NDArray[np.uint64]:
    """Return ``count`` random 64-bit words; numpy promises raw bit streams never to change."""
    return np.random.PCG64(derive_seed(*names)).random_raw(count)


def epoch_permutation(size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order ``[size]`` of one epoch (ranks of random words; ties keep their order)."""
    return np.argsort(_raw(size, seed, "epoch", epoch), kind="stable").astype(np.int64)


def epoch_flips(size: int, seed: int, epoch: int) -> npt.NDArray[np.bool_]:
    """Return whether each position ``[size]`` of an epoch is mirrored."""
    return (_raw(size, seed, "flip", epoch) >> np.uint64(63)).astype(np.bool_)


@dataclass(frozen=True)
class Slice:
    """A stretch of the stream on one device: dataset indices int64 ``[n]``, mirror bits."""

    indices: Tensor
    flips: Tensor


class ShuffledStream:
    """The stream of a dataset of ``size`` images, with the order kept on ``device``.

    Once per epoch the order is uploaded; after that a batch is a view of it, without a
    host-device synchronisation.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.size = size
        self.device = device or torch.device("cpu")
        self._epochs: OrderedDict[tuple[int, int], Slice] = OrderedDict()

    def epoch(self, seed: int, epoch: int) -> Slice:
        """Return order and mirror bits of a whole epoch."""
        key = (seed, epoch)
        if key not in self._epochs:
            whole = Slice(
                torch.from_numpy(epoch_permutation(self.size, seed, epoch)),
                torch.from_numpy(epoch_flips(self.size, seed, epoch)),
            )
            if self.device.type == "cuda":
                whole = Slice(
                    whole.indices.pin_memory().to(self.device, non_blocking=True),
                    whole.flips.pin_memory().to(self.device, non_blocking=True),
                )
            self._epochs[key] = whole
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[key]

    def take(self, start: int, count: int, seed: int) -> Slice:
        """Return positions ``start … start + count - 1`` of the stream."""
        parts, end = [], start + count
        while start < end:
            epoch, offset = divmod(start, self.size)
            length = min(end - start, self.size - offset)
            whole = self.epoch(seed, epoch)
            parts.append(
                Slice(
                    whole.indices[offset : offset + length], whole.flips[offset : offset + length]
                )
            )
            start += length
        if len(parts) == 1:
            return parts[0]
        return Slice(torch.cat([p.indices for p in parts]), torch.cat([p.flips for p in parts]))
