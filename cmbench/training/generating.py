"""Makes the data that a model generates for a phase of training (:mod:`cmbench.training.pairs`)."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmbench.errors import NonFiniteError, PluginError
from cmbench.files import write_atomically, write_sealed
from cmbench.locks import locked
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import GeneratedData, Nets
from cmbench.training.distributed import World
from cmbench.training.pairs import StoredPairs


@dataclass
class PairMaker:
    """Makes pairs with the networks of a training; ``networks`` are all whose calls count."""

    nets: Nets
    networks: Sequence[CountedNetwork]
    device: torch.device
    batch_size: int
    #: fill every batch up to this size, for compiled networks
    fixed_batch: bool = False

    @torch.no_grad()
    def images(self, wanted: GeneratedData, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Return what is made of unit noise ``[N, C, H, W]``: float32 ``[N, S, C, H, W]``.

        Raises:
            PluginError: another shape, or other network evaluations than declared.
            NonFiniteError: an image is not finite.
        """
        before = self._evaluations()
        made: Any = wanted.make(self.nets, noise, labels)
        n, *shape = noise.shape
        allowed = [(n, wanted.states, *shape), *([(n, *shape)] if wanted.states == 1 else [])]
        if not isinstance(made, Tensor) or tuple(made.shape) not in allowed:
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise _broken(wanted, f"make returned {found}", f"a tensor of shape {allowed[0]}")
        counted = self._evaluations() - before
        if counted and wanted.nfe is not None and counted != n * wanted.nfe:
            problem = f"declares {wanted.nfe} network evaluations per pair, {counted / n:g} counted"
            raise _broken(wanted, problem, "as many as counted, or nfe=None where they differ")
        return made.float().reshape(n, wanted.states, *shape)

    def _evaluations(self) -> int:
        return sum(network.evaluations for network in self.networks)

    def shard(self, stored: StoredPairs, number: int) -> None:
        """Make a shard and write it; its facts last."""
        first, count = stored.extent(number)
        began, before = time.perf_counter(), sum(n.forward_equivalents for n in self.networks)
        labels = stored.labels(first, count) if stored.labels is not None else None
        parts = [
            self._stored(stored, first + start, min(self.batch_size, count - start), first, labels)
            for start in range(0, count, self.batch_size)
        ]
        sha256 = _write(stored.images_path(number), np.concatenate(parts))
        facts = {"pairs": count, "sha256": sha256}
        if labels is not None:
            classes = labels.cpu().numpy()
            small = classes.astype(np.min_scalar_type(classes.max()))
            facts["labels_sha256"] = _write(stored.labels_path(number), small)
        after = sum(network.forward_equivalents for network in self.networks)
        facts["network_evaluations"] = after - before
        facts["seconds"] = round(time.perf_counter() - began, 6)
        write_sealed(stored.facts_path(number), facts)

    def _stored(
        self, stored: StoredPairs, start: int, count: int, first: int, labels: Tensor | None
    ) -> npt.NDArray[Any]:
        """Return pairs ``start … start + count - 1`` as they are stored."""
        wanted = stored.wanted
        size = self.batch_size if self.fixed_batch else count
        rows = [start + min(i, count - 1) for i in range(size)]
        noise = stored.noise(rows).to(self.device)
        classes = None if labels is None else labels[torch.tensor(rows) - first].to(self.device)
        made = self.images(wanted, noise, classes)[:count]
        kept = made.to(getattr(torch, wanted.dtype)).cpu().numpy()
        if not np.isfinite(kept).all():
            hint = "" if wanted.dtype == "float32" else ", or give GeneratedData dtype='float32'"
            raise NonFiniteError(
                "generated data",
                f"an image of pairs {start} to {start + count - 1} is not finite in {wanted.dtype}",
                remedy=f"check the model that makes them{hint}",
            )
        return kept


def _broken(wanted: GeneratedData, problem: str, allowed: str) -> PluginError:
    who = f"generated data, solver {wanted.solver!r}"
    return PluginError(who, problem, allowed=allowed, remedy="fix the method's phases")


def _write(path: Path, array: npt.NDArray[Any]) -> str:
    """Write an array as ``.npy``, atomically; return the hash of the file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    data = file.getvalue()
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def make_missing(
    stored: StoredPairs,
    maker: PairMaker,
    world: World,
    should_stop: Callable[[], str | None],
    progress: Callable[[int, int], None],
) -> str | None:
    """Make all pairs that are not there yet, each process its share of the shards.

    Returns:
        Why it stopped early, or None. What was made is kept.

    Raises:
        BusyError: another training makes them.
        PluginError, NonFiniteError: see :meth:`PairMaker.images`.
    """
    if not world.lead(stored.missing):
        return None
    with ExitStack() as held:
        world.lead(lambda: held.enter_context(_alone(stored.folder)))
        missing: list[int] = world.lead(stored.missing)  # what another has not made meanwhile
        try:
            for turn in range(math.ceil(len(missing) / world.size)):
                with world.together():
                    for number in missing[world.rank :: world.size][turn : turn + 1]:
                        maker.shard(stored, number)
                done = min((turn + 1) * world.size, len(missing))
                progress(done * stored.shard_pairs, len(missing) * stored.shard_pairs)
                reason = should_stop()
                if world.agree(bool(reason))[0]:
                    return reason or "stopped by another process"
        finally:
            for network in maker.networks:
                network.forward_equivalents = 0  # the pairs' cost, which the shards' facts hold
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, without the temporary files of processes that were killed."""
    wait = "wait for it, then start the same command again"
    with locked(folder, f"generated data {folder.name}", "makes it", wait):
        for left in folder.glob("*.tmp"):
            left.unlink()
        yield
