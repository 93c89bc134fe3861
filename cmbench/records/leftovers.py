"""What a workspace could do without: temporary files of killed processes, old checkpoints, runs
that no record names. Imports no torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmbench.errors import UserError
from cmbench.locks import is_locked
from cmbench.records.folders import read_records
from cmbench.records.record import Record
from cmbench.records.workspace import RUNS, Workspace

#: As :func:`cmbench.files.write_atomically` names them: with the process that writes.
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
#: What a run's folder has once its training is complete.
_RESULT = "result.json"


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can go, and why."""

    path: Path
    reason: str
    bytes: int

    def remove(self) -> None:
        """Delete it; what is gone already is no error."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def leftovers(workspace: Workspace) -> list[Leftover]:
    """Return what could go, by path.

    A run that a process trains now, and one whose folder cannot be locked, is left out.

    Raises:
        UserError: a record cannot be read, so it is not known which runs it needs.
    """
    named = _runs_named(workspace)
    found = [*_temporary_files(workspace.root)]
    for folder in sorted((workspace.root / RUNS).glob("*/*")):
        run = f"{folder.parent.name}/{folder.name}"
        if not folder.is_dir() or folder.is_symlink() or is_locked(folder):
            continue
        if run not in named:
            state = "finished" if (folder / _RESULT).exists() else "unfinished"
            found.append(Leftover(folder, f"{state} run that no record names", _size(folder)))
        elif (folder / _RESULT).exists():
            found += _old_checkpoints(folder)
    inside = {item.path for item in found}
    return [item for item in found if not inside & set(item.path.parents)]


def _runs_named(workspace: Workspace) -> set[str]:
    """Return the runs that records name, as their own or as a teacher's."""
    named: set[str] = set()
    for folder in sorted(workspace.all_records.glob("*")):
        for _, record in read_records(folder) if folder.is_dir() else ():
            if isinstance(record, UserError):
                raise record
            named |= _names(record)
    return named


def _names(record: Record) -> set[str]:
    training = record.training
    return {name for name in (training.run, training.teacher) if name}


def _temporary_files(root: Path) -> Iterator[Leftover]:
    """Yield files that a process began to write and left behind when it was killed."""
    for path in sorted(root.rglob(".*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and not _is_alive(int(match[1])):
            size = path.stat().st_size
            yield Leftover(path, f"temporary file of process {match[1]}, which is gone", size)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _old_checkpoints(folder: Path) -> Iterator[Leftover]:
    """Yield the checkpoints of a finished run but for its last, from which lost weights come."""
    stems = sorted({p.stem for p in (folder / "checkpoints").glob("*.json")})
    for stem in stems[:-1]:
        for suffix in (".json", ".safetensors"):
            path = folder / "checkpoints" / f"{stem}{suffix}"
            if path.is_file():
                yield Leftover(path, "superseded checkpoint", path.stat().st_size)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
