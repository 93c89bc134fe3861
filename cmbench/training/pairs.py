"""Data that a model generates for a phase of training: pairs of noise and what is made of it.

Pairs are made in shards. Pair i starts from noise and a label of seeds that depend on i only, so
neither batches nor processes nor interruptions matter. A shard is complete when its facts exist,
which are written last; facts hold the hash of the shard, so damage is found and made again. Noise
is not stored: it is drawn again from the same seeds.

    <folder>/00000.npy          float16 or float32 [pairs, states, C, H, W], read as a memory map
    <folder>/00000-labels.npy   small integers [pairs], where there are classes
    <folder>/00000.json         hash, network evaluations, seconds
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmbench.data.npy import map_npy
from cmbench.data.streams import ShuffledStream
from cmbench.files import UNREADABLE, read_sealed, sha256_file
from cmbench.plugin.method import Batch, GeneratedData
from cmbench.sampling.draws import Drawing
from cmbench.seeds import derive_seed

#: Seed of the noise and the labels of all pairs: no sampling seed, and no training seed.
SEED = derive_seed("generated data")
#: A shard has at most so many pairs and bytes: what a killed process loses, and what one makes
#: between two looks at whether to stop.
_SHARD_PAIRS, _SHARD_BYTES = 1024, 64 * 2**20
#: Noise of all pairs is kept in memory up to this size: it takes long to draw.
_KEPT_NOISE_BYTES = 512 * 2**20

LabelsOf = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class PairCost:
    """What pairs have cost, whichever runs made them."""

    pairs: int
    network_evaluations: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class StoredPairs:
    """The pairs of one folder.

    Args:
        folder: where they are; its name stands for all that decides them.
        wanted: how many there are and how they are made.
        shape: of an image, ``(C, H, W)``.
        labels: the classes of pairs ``(first, count)``; None without classes.
    """

    folder: Path
    wanted: GeneratedData
    shape: tuple[int, int, int]
    labels: LabelsOf | None

    @property
    def shard_pairs(self) -> int:
        """Pairs of a shard; the last one may have fewer."""
        return max(1, min(_SHARD_PAIRS, _SHARD_BYTES // self.pair_bytes, self.wanted.count))

    @property
    def pair_bytes(self) -> int:
        """Bytes of a pair's images."""
        return self.wanted.states * math.prod(self.shape) * np.dtype(self.wanted.dtype).itemsize

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.wanted.count / self.shard_pairs)

    def extent(self, number: int) -> tuple[int, int]:
        """Return the first pair of a shard and how many it has."""
        first = number * self.shard_pairs
        return first, min(self.shard_pairs, self.wanted.count - first)

    def images_path(self, number: int) -> Path:
        """Return the file of a shard's images."""
        return self.folder / f"{number:05d}.npy"

    def labels_path(self, number: int) -> Path:
        """Return the file of a shard's labels."""
        return self.folder / f"{number:05d}-labels.npy"

    def facts_path(self, number: int) -> Path:
        """Return the file of a shard's facts."""
        return self.folder / f"{number:05d}.json"

    def facts(self, number: int) -> Mapping[str, Any] | None:
        """Return a shard's facts; None unless it is complete and undamaged."""
        try:
            found = read_sealed(self.facts_path(number))
            hashes = [(self.images_path(number), found["sha256"])]
            if self.labels is not None:
                hashes.append((self.labels_path(number), found["labels_sha256"]))
            return found if all(sha256_file(path) == sha for path, sha in hashes) else None
        except (*UNREADABLE, KeyError):
            return None

    def missing(self) -> list[int]:
        """Return the shards that are still to be made, or are damaged; reads every file."""
        return [number for number in range(self.shards) if self.facts(number) is None]

    def cost(self) -> PairCost:
        """Return what all pairs have cost; they must be complete."""
        facts = [read_sealed(self.facts_path(number)) for number in range(self.shards)]
        size = sum(path.stat().st_size for path in self.folder.glob("*.npy"))
        evaluations = sum(int(f["network_evaluations"]) for f in facts)
        seconds = sum(float(f["seconds"]) for f in facts)
        return PairCost(self.wanted.count, evaluations, seconds, size)

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Return unit noise float32 ``[N, C, H, W]`` of the pairs ``indices``, on the CPU."""
        return Drawing("noise", "normal", self.shape).make(SEED, indices)


@dataclass(frozen=True)
class PairRoot:
    """Where pairs are stored, and what decides them beside what a phase asks for.

    Args:
        folder: has one folder for each kind of pairs.
        about: the dataset, its classes, the precision of networks.
        teacher: ``teacher()`` is the hash of what a teacher's pairs depend on.
        content: ``content(modules)`` is the hash of their weights.
        shape: of an image, ``(C, H, W)``.
        labels: the classes of pairs ``(first, count)``; None without classes.
        progress: called with the pairs made so far in this process, and those to make.
    """

    folder: Path
    about: Mapping[str, Any]
    teacher: Callable[[], str]
    content: Callable[[Sequence[str]], str]
    shape: tuple[int, int, int]
    labels: LabelsOf | None
    progress: Callable[[int, int], None] = lambda done, total: None

    def open(self, wanted: GeneratedData) -> StoredPairs:
        """Return the pairs that a phase asks for, made or not."""
        decides = {
            **self.about,
            "made_by": self.content(wanted.made_by) if wanted.made_by else self.teacher(),
            "solver": wanted.solver,
            "nfe": wanted.nfe,
            "count": wanted.count,
            "states": wanted.states,
            "dtype": wanted.dtype,
            "shape": list(self.shape),
            "labelled": self.labels is not None,
        }
        digits = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        slug = re.sub(r"[^a-z0-9.]+", "-", wanted.solver.lower()).strip("-")[:40]
        folder = self.folder / f"{slug}-{wanted.count}-{digits}"
        return StoredPairs(folder, wanted, self.shape, self.labels)


# ---- reading them --------------------------------------------------------------------------------


def _mapped(path: Path) -> Tensor:
    """Return a shard's images as a memory map that keeps no file open: there may be thousands.

    Python's own maps keep a descriptor each.
    """
    array: Any = map_npy(path)
    first, dtype = array.offset // array.itemsize, getattr(torch, array.dtype.name)
    flat = torch.from_file(str(path), shared=False, size=first + array.size, dtype=dtype)
    return flat[first:].reshape(array.shape)


@dataclass
class PairFeed:
    """Training batches of pairs (see ``training.settings.Feed``), shuffled anew in every pass."""

    stored: StoredPairs
    device: torch.device
    _stream: ShuffledStream = field(init=False)
    _images: list[Tensor] = field(init=False)
    _labels: Tensor | None = field(init=False)
    _noise: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        stored, numbers = self.stored, range(self.stored.shards)
        self._stream = ShuffledStream(stored.wanted.count)
        self._images = [_mapped(stored.images_path(n)) for n in numbers]
        self._labels = None
        if stored.labels is not None:
            parts = [map_npy(stored.labels_path(n)) for n in numbers]
            self._labels = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if 4 * stored.wanted.count * math.prod(stored.shape) <= _KEPT_NOISE_BYTES:
            self._noise = torch.full((stored.wanted.count, *stored.shape), math.nan)

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return pairs at the positions ``start … start + count - 1`` of the stream of ``seed``."""
        indices = self._stream.take(start, count, seed).indices
        rows = indices.tolist()
        size = self.stored.shard_pairs
        read = torch.stack([self._images[i // size][i % size] for i in rows])
        target = read.float().to(self.device)
        if self.stored.wanted.states == 1:
            target = target[:, 0]
        labels = None if self._labels is None else self._labels[indices].to(self.device)
        noise = self._noise_of(indices, rows).to(self.device)
        images = target if self.stored.wanted.states == 1 else target[:, -1]
        return Batch(images, labels, indices=indices, noise=noise, target=target)

    def _noise_of(self, indices: Tensor, rows: Sequence[int]) -> Tensor:
        if self._noise is None:
            return self.stored.noise(rows)
        unknown = self._noise[indices].flatten(1)[:, 0].isnan().nonzero().flatten().tolist()
        if unknown:
            drawn = [rows[i] for i in unknown]
            self._noise[drawn] = self.stored.noise(drawn)
        return self._noise[indices]
