"""Reading a prepared dataset back and comparing it with its hashes. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cmbench.data.layout import Layout, hash_block
from cmbench.data.store import (
    IMAGES,
    DatasetManifest,
    Store,
    check_content_hash,
    open_store,
    read_blocks,
)
from cmbench.errors import UserError
from cmbench.files import regular

#: ``progress(stage, images done, images in all)``; a stage with a total of 0 cannot be counted.
ProgressCallback = Callable[[str, int, int], None]


#: A dataset up to this size is checked block by block as it is read, whatever the order.
CHECKED_BYTES = 2**30
#: Blocks of a larger one that are checked on opening, chosen anew each time.
SAMPLED_BLOCKS = 8


class CheckedBlocks:
    """Compares blocks of an open dataset with their hashes, each once, before they are used.

    A dataset above :data:`CHECKED_BYTES` is read in any order, so that a few images would cost
    their whole blocks: :data:`SAMPLED_BLOCKS` of it are checked on opening, and all of them where
    it is read from end to end, or by `cmbench prepare --verify`.

    Raises:
        UserError: hashes and manifest disagree.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.hashes = store, read_blocks(store.folder)
        check_content_hash(store.folder, store.manifest, self.hashes)
        self._size, self._known = store.manifest.block_images, [False] * len(self.hashes)
        self.in_any_order = store.images.nbytes <= CHECKED_BYTES
        if not self.in_any_order:
            blocks = range(len(self.hashes))
            self._check(random.SystemRandom().sample(blocks, min(SAMPLED_BLOCKS, len(blocks))))

    def check_images(self, indices: npt.NDArray[np.int64]) -> None:
        """Check the blocks of images that are about to be read in any order.

        Raises:
            UserError: images have changed since they were prepared; the message names them.
        """
        if self.in_any_order and not all(self._known):
            self._check(np.unique(indices // self._size).tolist())

    def check_range(self, first: int, stop: int) -> None:
        """Check the blocks of the images ``first … stop - 1``, read from end to end."""
        self._check(range(first // self._size, -(-stop // self._size)))

    def _check(self, blocks: Iterable[int]) -> None:
        unknown = [block for block in blocks if not self._known[block]]
        if not unknown:
            return
        with ThreadPoolExecutor(min(len(unknown), len(os.sched_getaffinity(0)))) as threads:
            for block, digest in zip(unknown, threads.map(self._hash, unknown), strict=True):
                if digest != self.hashes[block]:
                    raise changed_images(self.store.folder, self.store.manifest, [block])
                self._known[block] = True

    def _hash(self, block: int) -> str:
        part = self.store.images[block * self._size : (block + 1) * self._size]
        return hashlib.sha256(np.ascontiguousarray(part).data).hexdigest()


def changed_images(folder: Path, manifest: DatasetManifest, blocks: Sequence[int]) -> UserError:
    """Return the error for blocks of images that have other hashes."""
    size, count = manifest.block_images, manifest.count
    some = ", ".join(f"{b * size}-{min((b + 1) * size, count) - 1}" for b in blocks[:5])
    some += ", …" if len(blocks) > 5 else ""
    return UserError(
        f"prepared dataset {folder}",
        f"images {some} have changed since they were prepared",
        allowed=f"SHA-256 {manifest.sha256[:16]}…",
        remedy=f"run `cmbench prepare {folder.name} --source … --force` again",
    )


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def changed_blocks(
    path: Path, layout: Layout, count: int, hashes: Sequence[str], progress: ProgressCallback
) -> list[int]:
    """Return the blocks of an images file of ``count`` images that differ from ``hashes``."""
    changed = []
    progress("verifying", 0, count)
    file = os.open(regular(path), os.O_RDONLY)
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            found = threads.map(lambda b: hash_block(file, layout, b, count), range(len(hashes)))
            for block, digest in enumerate(found):
                if digest != hashes[block]:
                    changed.append(block)
                progress("verifying", layout.block_range(block, count)[1], count)
    finally:
        os.close(file)
    return changed


def verify(folder: Path, progress: ProgressCallback = no_progress) -> DatasetManifest:
    """Check every byte of a prepared dataset; raise ``UserError`` naming the damaged images."""
    manifest = open_store(folder).manifest
    hashes = read_blocks(folder)
    check_content_hash(folder, manifest, hashes)
    channels, height, width = manifest.shape[1:]
    layout = Layout((channels, height, width), manifest.dtype)
    changed = changed_blocks(folder / IMAGES, layout, manifest.count, hashes, progress)
    if changed:
        raise changed_images(folder, manifest, changed)
    return manifest
