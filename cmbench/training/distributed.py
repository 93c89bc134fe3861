"""Several processes as one: how a batch is split and how gradients are summed.

A batch is cut into shards by position alone; each process takes a contiguous run of shards. One
process that accumulates the same shards therefore sees the same images with the same randomness.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmbench.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1

    def shards(self, batch_size: int, microbatch_size: int | None) -> Iterator[tuple[int, int]]:
        """Yield ``(first, count)`` for each of this process's shards of a batch.

        Raises:
            UserError: if the batch does not divide evenly.
        """
        share, rest = divmod(batch_size, self.size)
        shard = min(microbatch_size or share, share) or 1
        if rest or share % shard:
            raise UserError(
                "batch_size",
                f"{batch_size} images do not split evenly over {self.size} process(es) "
                f"in shards of {microbatch_size or share}",
                allowed="a multiple of processes x microbatch_size",
            )
        for first in range(self.rank * share, (self.rank + 1) * share, shard):
            yield first, shard

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all processes, in one flat message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
