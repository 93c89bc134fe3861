"""Files that are whole or absent, and file names as text."""

from __future__ import annotations

import os
from pathlib import Path

from cmbench.errors import UserError


def readable(name: str) -> str:
    """Return a file name as text that can be written; bytes outside UTF-8 become ``\\xNN``."""
    if name.isascii():
        return name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary name next to ``path``, flush it to disk, rename it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path}",
            error.strerror or str(error),
            remedy="free space or choose a writable folder with --workspace",
        ) from error
