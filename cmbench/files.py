"""Files that are whole or absent: written to a temporary name, flushed, renamed."""

from __future__ import annotations

import os
from pathlib import Path

from cmbench.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary name beside ``path``, flush it to disk, rename it."""
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
