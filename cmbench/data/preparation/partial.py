"""A preparation under way: its folder, its journal, and how it ends.

``<dataset>.partial`` lies next to the final folder. The journal keeps the blocks that are done with
their hashes, so that the same command resumes after a kill; in the end every block is read back
and compared, and the folder is renamed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cmbench.data.layout import Layout
from cmbench.data.preparation.decode import BlockDone
from cmbench.data.store import BLOCKS, IMAGES, LABELS, MANIFEST
from cmbench.data.verify import ProgressCallback, changed_blocks
from cmbench.errors import BusyError, UserError
from cmbench.files import read_json, regular

WHO = "cmbench prepare"
_JOURNAL, _PLAN, _SPOOL = "journal.jsonl", "plan.json", "source.tar"


@dataclass
class Partial:
    """The folder of an unfinished dataset, and what its journal says is done."""

    folder: Path
    done: dict[int, BlockDone] = field(default_factory=dict)

    @property
    def images(self) -> Path:
        """The images file."""
        return self.folder / IMAGES

    @property
    def spool(self) -> Path:
        """Where a compressed tar is unpacked to: the beginning of the file's name."""
        return self.folder / _SPOOL

    # ---- begin or resume -----------------------------------------------------------------------

    def open(self, plan: dict[str, Any], *, restart: bool) -> None:
        """Resume if the plan is that of the unfinished preparation; start otherwise."""
        path = self.folder / _PLAN
        begun = _read_plan(path)
        if begun is not None and not restart:
            changed = sorted(k for k in plan | begun if begun.get(k) != plan.get(k))
            if changed:
                raise UserError(
                    WHO,
                    f"{self.folder} holds a preparation that was started with other settings "
                    f"({', '.join(changed)} differ)",
                    remedy="repeat the first command to resume it, or add --restart to discard it",
                )
            self._read_journal()
            return
        for name in (_JOURNAL, IMAGES, LABELS, BLOCKS, MANIFEST):
            (self.folder / name).unlink(missing_ok=True)
        self.done = {}
        path.write_text(json.dumps(plan, indent=1), encoding="utf-8")

    def _read_journal(self) -> None:
        path = self.folder / _JOURNAL
        if not path.exists() or not self.images.exists():
            return
        for line in regular(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                block = BlockDone(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the line that a kill cut short
            self.done[block.block] = block

    def add(self, block: BlockDone) -> None:
        """Note a block as done."""
        self.done[block.block] = block
        with open(self.folder / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(block._asdict()) + "\n")

    def allocate(self, layout: Layout, count: int) -> None:
        """Make the images file at its full length if the disk has room for it.

        It stays sparse: writing into reserved blocks costs five times as much.
        """
        size = layout.offset(count)
        if self.images.exists() and self.images.stat().st_size == size:
            return
        self.done = {}
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                WHO,
                f"{size / 2**30:.1f} GiB are needed in {self.folder.parent}",
                allowed=f"{free / 2**30:.1f} GiB are free",
                remedy="free some space, or set CMBENCH_DATA to another disk",
            )
        with open(self.images, "wb") as file:
            file.write(layout.header(count))
            file.truncate(size)

    # ---- end -----------------------------------------------------------------------------------

    def verified(self, layout: Layout, count: int, progress: ProgressCallback) -> list[str]:
        """Read every block back and compare it with its hash; return the hashes in order."""
        total = layout.blocks(count)
        hashes = [self.done[block].sha256 for block in range(total)]
        bad = changed_blocks(self.images, layout, count, hashes, progress)
        with open(self.images, "rb") as file:
            os.fsync(file.fileno())
        if bad:
            self._forget(bad)
            raise UserError(
                WHO,
                f"{len(bad)} of {total} blocks of {self.images} read back differently",
                remedy="run the same command again, it makes them again; if this repeats, check "
                "the disk",
            )
        return hashes

    def _forget(self, blocks: list[int]) -> None:
        for block in blocks:
            del self.done[block]
        lines = [json.dumps(b._asdict()) + "\n" for b in self.done.values()]
        (self.folder / _JOURNAL).write_text("".join(lines), encoding="utf-8")

    def put_in_place(self, target: Path) -> None:
        """Rename the finished folder to its final name, then remove the one it replaces."""
        for name in (_JOURNAL, _PLAN):
            (self.folder / name).unlink(missing_ok=True)
        for spooled in self.folder.glob(f"{_SPOOL}*"):
            spooled.unlink()
        old = target.with_name(f"{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        self.folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Give the preparation up: the folder is removed when the lock is released."""
        (self.folder / _PLAN).unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Leave no trace of a preparation that failed before its first block."""
        begun = (self.folder / _PLAN).exists() and (self.folder / _JOURNAL).exists()
        if self.folder.exists() and not begun:
            shutil.rmtree(self.folder)


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        plan = read_json(path)
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


@contextmanager
def locked(target: Path) -> Iterator[Partial]:
    """Hold the lock of a dataset and give its partial folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            WHO, f"another process prepares {target.name!r}", remedy="wait until it has finished"
        ) from None
    try:
        partial = Partial(target.with_name(f"{target.name}.partial"))
        partial.folder.mkdir(exist_ok=True)
        try:
            yield partial
        finally:
            partial.remove_if_empty()
    finally:
        lock.release()


@contextmanager
def os_errors(data_dir: Path) -> Iterator[None]:
    """Turn errors of the operating system into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            WHO,
            f"{error.strerror or error}: {error.filename or data_dir}",
            remedy="what is done is kept: make room, then run the same command again"
            if full
            else "set CMBENCH_DATA (or --data-dir) to a folder that you can write, then run the "
            "same command again: what is done is kept",
        ) from None
