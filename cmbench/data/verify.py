"""Reading a prepared dataset back and comparing it with its hashes. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmbench.data.layout import Layout, hash_block
from cmbench.data.store import IMAGES, DatasetManifest, check_content_hash, open_store, read_blocks
from cmbench.errors import UserError

#: ``progress(stage, images done, images in all)``; a stage with a total of 0 cannot be counted.
ProgressCallback = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def changed_blocks(
    path: Path, layout: Layout, count: int, hashes: Sequence[str], progress: ProgressCallback
) -> list[int]:
    """Return the blocks of an images file of ``count`` images that differ from ``hashes``."""
    changed = []
    progress("verifying", 0, count)
    file = os.open(path, os.O_RDONLY)
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
        ranges = (layout.block_range(block, manifest.count) for block in changed[:5])
        some = ", ".join(f"{first}-{stop - 1}" for first, stop in ranges)
        some += ", …" if len(changed) > 5 else ""
        raise UserError(
            f"prepared dataset {folder}",
            f"images {some} have changed since they were prepared",
            allowed=f"SHA-256 {manifest.sha256[:16]}…",
            remedy=f"run `cmbench prepare {folder.name} --source … --force` again",
        )
    return manifest
