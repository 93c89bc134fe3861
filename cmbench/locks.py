"""The lock of a folder that one process at a time works in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cmbench.errors import BusyError, UserError

#: Name of the lock in its folder.
LOCK = ".lock"


@contextmanager
def locked(folder: Path, who: str, doing: str, remedy: str) -> Iterator[None]:
    """Make a folder and hold its lock.

    Args:
        folder: made if it does not exist.
        who: what the folder is of, for messages.
        doing: what another process does to it, for messages: ``is training it``.
        remedy: ends the message.

    Raises:
        BusyError: another process holds the lock.
        UserError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        problem = f"another process {doing} (lock {folder / LOCK})"
        raise BusyError(who, problem, remedy=remedy) from error
    except OSError as error:
        raise UserError(
            f"workspace folder {folder}",
            f"cannot be written ({error.strerror})",
            remedy="choose a writable folder with --workspace",
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether a process works in a folder, or it cannot be told."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except (Timeout, OSError):
        return True
