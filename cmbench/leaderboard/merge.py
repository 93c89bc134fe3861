"""Merge folders of records: equal ones once, conflicting ones refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmbench.errors import MissingError, UserError
from cmbench.files import regular, sha256_file, write_atomically
from cmbench.leaderboard.reproduced import agreement
from cmbench.leaderboard.sampled_again import Check
from cmbench.records.folders import REPRODUCTIONS, read_cell, record_files
from cmbench.records.record import Record


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
    #: Cells that were measured twice with results that agree, and how well.
    reproduced: tuple[str, ...] = ()


#: A record that reproduces another one, its file, and what was compared.
Evidence = tuple[Path, Record, list[Check]]


def find_records(source: Path, who: str = "merge") -> list[Path]:
    """Return the record files of a workspace, a ``records`` folder or one dataset's folder.

    Raises:
        UserError: ``source`` is not a folder or has no records.
    """
    if not source.is_dir():
        raise (UserError if source.exists() else MissingError)(
            who,
            f"{source} is not a folder",
            allowed="workspaces or folders of records",
            remedy="check the path",
        )
    root = source / "records" if (source / "records").is_dir() else source
    found = sorted(record_files(root) + record_files(root, "*/*.json"))
    if not found:
        raise UserError(who, f"{source} has no records", remedy="check the path")
    again = [f"{REPRODUCTIONS}/*/*.json", f"*/{REPRODUCTIONS}/*/*.json"]
    return found + sorted(path for pattern in again for path in record_files(root, pattern))


def merge(sources: Sequence[Path], target: Path) -> MergeResult:
    """Copy the records of ``sources`` with their artifacts to ``target/<dataset>/``.

    All records are read and all conflicts found before anything is written. A finished record
    replaces a failed or skipped one of the same cell. Of two finished ones that differ, the second
    is kept as a reproduction if everything that decides the numbers is equal and the numbers agree
    within the tolerance of :mod:`cmbench.leaderboard.reproduced`; otherwise they are a conflict,
    and so are two artifacts of one name that differ: no file is ever overwritten by another one.
    Files that cannot be read, or are not named after their cell, are neither copied nor replaced,
    and are returned with the reason.

    Raises:
        UserError: a source that has no records, or every conflicting cell or artifact by name
            with the files.
    """
    conflicts: list[str] = []
    unreadable: list[UserError] = []
    files = record_files(target, "*/*.json") if target.is_dir() else []
    reproduced: dict[str, Evidence] = {}
    there = {_key(record): (path, record) for path, record in _readable(files, unreadable)}
    chosen = dict(there)
    kept = set(files) - {path for path, _ in there.values()}
    seen = set()
    for source in sources:
        for path, record in _readable(find_records(source), unreadable):
            if target / record.dataset.name / f"{record.cell}.json" not in kept:
                seen.add(_key(record))
                _choose(path, record, chosen, reproduced, conflicts)
    if conflicts:
        raise UserError(
            "merge",
            f"{len(conflicts)} conflicting cell(s): {'; '.join(conflicts)}",
            remedy="records are immutable: keep one of each pair and move the other away",
        )
    chosen = {key: found for key, found in chosen.items() if key in seen}
    result = _write(chosen, there, target)
    told, left_out = _write_evidence(reproduced.values(), target)
    return replace(
        result,
        unreadable=tuple(unreadable),
        reproduced=tuple(told),
        left_out=(*result.left_out, *left_out),
    )


def _key(record: Record) -> tuple[str, str]:
    return record.dataset.name, record.cell


def _readable(paths: Sequence[Path], unreadable: list[UserError]) -> Iterator[tuple[Path, Record]]:
    """Yield the records of ``paths``; collect the errors of the others."""
    for path in paths:
        try:
            yield path, read_cell(path)
        except UserError as error:
            unreadable.append(error)


def _choose(
    path: Path,
    record: Record,
    chosen: dict[tuple[str, str], tuple[Path, Record]],
    reproduced: dict[str, Evidence],
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
        checks = agreement(other, record)
        failed = [check for check in checks if check.state == "failed"]
        if failed:
            reasons = ", ".join(f"{check.name}: {check.detail}" for check in failed[:3])
            name = f"{record.dataset.name}/{record.cell}"
            conflicts.append(f"{name} in {other_path} and {path} ({reasons})")
        else:
            reproduced.setdefault(record.sha256, (path, record, checks))
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
    kept = {**there, **chosen}.values()
    copies, left_out = _plan_artifacts(kept, new, lambda record: target / record.dataset.name)
    for goal, source in copies.items():
        write_atomically(goal, regular(source).read_bytes())
    for _, record in new:
        folder = target / record.dataset.name
        write_atomically(folder / f"{record.cell}.json", record.to_json().encode())
    return MergeResult(tuple(added), tuple(equal), tuple(replaced), left_out=tuple(left_out))


def _write_evidence(found: Iterable[Evidence], target: Path) -> tuple[list[str], list[str]]:
    """Write reproductions with their artifacts, each into a folder of its own."""
    told, left_out = [], []
    for path, record, checks in found:
        folder = target / record.dataset.name / REPRODUCTIONS / record.sha256[:12]
        if not (folder / path.name).exists():
            left_out += _write_reproduction(path, record, folder)
            within = (f"{c.name} {c.detail}" for c in checks if c.name.startswith("metric"))
            told.append(f"{record.dataset.name}/{record.cell}: {', '.join(within)}")
    return told, left_out


def _write_reproduction(path: Path, record: Record, folder: Path) -> list[str]:
    item = [(path, record)]
    copies, left_out = _plan_artifacts(item, item, lambda _: folder)
    for goal, source in copies.items():
        write_atomically(goal, regular(source).read_bytes())
    write_atomically(folder / f"{record.cell}.json", record.to_json().encode())
    return left_out


def _plan_artifacts(
    kept: Iterable[tuple[Path, Record]],
    new: Sequence[tuple[Path, Record]],
    folder_of: Callable[[Record], Path],
) -> tuple[dict[Path, Path], list[str]]:
    """Return what to copy, by goal, and why the others are left out; nothing is written yet.

    An artifact is copied if it has the hash that its record holds.

    Raises:
        UserError: the goal of an artifact holds other bytes, or another record wants other bytes
            there.
    """
    wanted = _wanted_hashes(kept, folder_of)
    copies: dict[Path, Path] = {}
    left_out, conflicts = [], []
    for path, record in new:
        for artifact in record.artifacts.values():
            label = f"{artifact.file!r} of {record.dataset.name}/{record.cell}"
            source = _inside(path.parent, artifact.file)
            goal = _inside(folder_of(record), artifact.file)
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


def _wanted_hashes(
    kept: Iterable[tuple[Path, Record]], folder_of: Callable[[Record], Path]
) -> dict[Path, str]:
    """Return the hash that the records want at each goal; empty if two records disagree."""
    wanted: dict[Path, str] = {}
    for _, record in kept:
        for artifact in record.artifacts.values():
            goal = _inside(folder_of(record), artifact.file)
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
