"""Reading a prepared dataset back and comparing it with its hashes. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmbench.data.layout import Layout, hash_block
from cmbench.data.store import IMAGES, DatasetManifest, check_content_hash, open_store, read_blocks
from cmbench.errors import UserError


def verify(
    folder: Path, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> DatasetManifest:
    """Check every byte of a prepared dataset; raise ``UserError`` naming the damaged images."""
    manifest = open_store(folder).manifest
    wanted = read_blocks(folder)
    check_content_hash(folder, manifest, wanted)
    channels, height, width = manifest.shape[1:]
    layout = Layout((channels, height, width), manifest.dtype)
    count, bad = manifest.count, []
    progress("verifying", 0, count)
    file = os.open(folder / IMAGES, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            found = threads.map(lambda b: hash_block(file, layout, b, count), range(len(wanted)))
            for block, digest in enumerate(found):
                first, stop = layout.block_range(block, count)
                if digest != wanted[block]:
                    bad.append(f"{first}-{stop - 1}")
                progress("verifying", stop, count)
    finally:
        os.close(file)
    if bad:
        some = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        raise UserError(
            f"prepared dataset {folder}",
            f"images {some} have changed since they were prepared",
            allowed=f"SHA-256 {manifest.sha256[:16]}…",
            remedy=f"run `cmbench prepare {folder.name} --source … --force` again",
        )
    return manifest
