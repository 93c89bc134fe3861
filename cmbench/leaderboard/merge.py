"""Merge folders of records: equal ones once, conflicting ones refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmbench.errors import MissingError, UserError
from cmbench.files import sha256_file, write_atomically
from cmbench.records.record import Record, read_record


@dataclass(frozen=True)
class MergeResult:
    """What a merge did with the sources' cells: added, already there, replaced as not finished."""

    added: tuple[str, ...]
    equal: tuple[str, ...]
    replaced: tuple[str, ...]
    #: Why records, of the sources or the target, were left alone.
    unreadable: tuple[UserError, ...] = ()
    #: Why artifacts were not copied.
    left_out: tuple[str, ...] = ()


def find_records(source: Path) -> list[Path]:
    """Return the record files of a workspace, a ``records`` folder or one dataset's folder.

    Raises:
        UserError: ``source`` is not a folder or has no records.
    """
    if not source.is_dir():
        raise (UserError if source.exists() else MissingError)(
            "merge",
            f"{source} is not a folder",
            allowed="workspaces or folders of records",
            remedy="check the path",
        )
    root = source / "records" if (source / "records").is_dir() else source
    found = sorted([*root.glob("*.json"), *root.glob("*/*.json")])
    if not found:
        raise UserError("merge", f"{source} has no records", remedy="check the path")
    return found


def merge(sources: Sequence[Path], target: Path) -> MergeResult:
    """Copy the records of ``sources`` with their artifacts to ``target/<dataset>/``.

    All records are read and all conflicts found before anything is written. A finished record
    replaces a failed or skipped one of the same cell; two finished ones that differ are a conflict,
    and so are two artifacts of one name that differ: no file is ever overwritten by another one.
    Files that cannot be read, or are not named after their cell, are neither copied nor replaced,
    and are returned with the reason.

    Raises:
        UserError: a source that has no records, or every conflicting cell or artifact by name
            with the files.
    """
    conflicts: list[str] = []
    unreadable: list[UserError] = []
    files = sorted(target.glob("*/*.json")) if target.is_dir() else []
    there = {_key(record): (path, record) for path, record in _readable(files, unreadable)}
    chosen = dict(there)
    kept = set(files) - {path for path, _ in there.values()}
    seen = set()
    for source in sources:
        for path, record in _readable(find_records(source), unreadable):
            if target / record.dataset.name / f"{record.cell}.json" not in kept:
                seen.add(_key(record))
                _choose(path, record, chosen, conflicts)
    if conflicts:
        raise UserError(
            "merge",
            f"{len(conflicts)} conflicting cell(s): {'; '.join(conflicts)}",
            remedy="records are immutable: keep one of each pair and move the other away",
        )
    chosen = {key: found for key, found in chosen.items() if key in seen}
    return replace(_write(chosen, there, target), unreadable=tuple(unreadable))


def _key(record: Record) -> tuple[str, str]:
    return record.dataset.name, record.cell


def _readable(paths: Sequence[Path], unreadable: list[UserError]) -> Iterator[tuple[Path, Record]]:
    """Yield the records of ``paths``; collect the errors of the others."""
    for path in paths:
        try:
            yield path, _read(path)
        except UserError as error:
            unreadable.append(error)


def _read(path: Path) -> Record:
    record = read_record(path)
    if path.stem != record.cell:
        raise UserError(
            f"record {path}",
            f"has the cell {record.cell!r}, which is not its name",
            allowed=f"{record.cell}.json",
            remedy="rename the file",
        )
    return record


def _choose(
    path: Path,
    record: Record,
    chosen: dict[tuple[str, str], tuple[Path, Record]],
    conflicts: list[str],
) -> None:
    key = _key(record)
    if key not in chosen:
        chosen[key] = (path, record)
        return
    other_path, other = chosen[key]
    if other.to_json() == record.to_json():
        return
    if other.status == "finished" and record.status == "finished":
        conflicts.append(f"{record.dataset.name}/{record.cell} in {other_path} and {path}")
    elif record.status == "finished" or (
        other.status != "finished" and record.created > other.created
    ):
        chosen[key] = (path, record)


def _write(
    chosen: dict[tuple[str, str], tuple[Path, Record]],
    there: dict[tuple[str, str], tuple[Path, Record]],
    target: Path,
) -> MergeResult:
    added: list[str] = []
    equal: list[str] = []
    replaced: list[str] = []
    new = []
    for (dataset, cell), (path, record) in chosen.items():
        name = f"{dataset}/{cell}"
        if (dataset, cell) in there and there[dataset, cell][0] == path:
            equal.append(name)
            continue
        (replaced if (dataset, cell) in there else added).append(name)
        new.append((path, record))
    copies, left_out = _plan_artifacts({**there, **chosen}.values(), new, target)
    for goal, source in copies.items():
        write_atomically(goal, source.read_bytes())
    for _, record in new:
        folder = target / record.dataset.name
        write_atomically(folder / f"{record.cell}.json", record.to_json().encode())
    return MergeResult(tuple(added), tuple(equal), tuple(replaced), left_out=tuple(left_out))


def _plan_artifacts(
    kept: Iterable[tuple[Path, Record]], new: Sequence[tuple[Path, Record]], target: Path
) -> tuple[dict[Path, Path], list[str]]:
    """Return what to copy, by goal, and why the others are left out; nothing is written yet.

    An artifact is copied if it has the hash that its record holds.

    Raises:
        UserError: the goal of an artifact holds other bytes, or another record wants other bytes
            there.
    """
    wanted = _wanted_hashes(kept, target)
    copies: dict[Path, Path] = {}
    left_out, conflicts = [], []
    for path, record in new:
        for artifact in record.artifacts.values():
            label = f"{artifact.file!r} of {record.dataset.name}/{record.cell}"
            source = _inside(path.parent, artifact.file)
            goal = _inside(target / record.dataset.name, artifact.file)
            if source is None or goal is None:
                left_out.append(f"{label}: leaves its folder")
            elif conflict := _conflict(source, goal, artifact.sha256, wanted[goal]):
                conflicts.append(f"{label} {conflict}")
            elif _hash(source) != artifact.sha256:
                left_out.append(f"{label}: {source} is missing or has another hash")
            elif source != goal:
                copies[goal] = source
    if conflicts:
        raise UserError(
            "merge",
            f"{len(conflicts)} conflicting artifact(s): {'; '.join(conflicts)}",
            remedy="keep the records of one of the machines and move the others away",
        )
    return copies, left_out


def _wanted_hashes(kept: Iterable[tuple[Path, Record]], target: Path) -> dict[Path, str]:
    """Return the hash that the records want at each goal; empty if two records disagree."""
    wanted: dict[Path, str] = {}
    for _, record in kept:
        for artifact in record.artifacts.values():
            goal = _inside(target / record.dataset.name, artifact.file)
            if goal is not None and wanted.setdefault(goal, artifact.sha256) != artifact.sha256:
                wanted[goal] = ""
    return wanted


def _conflict(source: Path, goal: Path, sha256: str, wanted: str) -> str:
    """Say why the artifact ``source`` of hash ``sha256`` cannot be copied to ``goal``, or ''."""
    if goal.suffix.lower() == ".json":
        return "has the name of a record"
    if wanted != sha256:
        return f"in {source} is another file than other records have"
    if _hash(goal) not in (None, sha256):
        return f"in {source} differs from {goal}"
    return ""


def _inside(folder: Path, file: str) -> Path | None:
    """Return where ``file`` lies; None if it leaves ``folder`` or is not a path."""
    try:
        root = folder.resolve()
        path = (root / file).resolve()
    except (OSError, ValueError, RuntimeError):  # NULs, loops of links
        return None
    return path if path.is_relative_to(root) and path != root else None


def _hash(path: Path) -> str | None:
    """Return the sha256 of the file ``path``; None if it does not exist."""
    try:
        return sha256_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:  # a folder, or a file in place of a folder
        return f"unreadable: {error.strerror}"
