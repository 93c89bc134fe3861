"""Merge folders of records: equal ones once, conflicting ones refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmbench.bench.record import Record, read_record
from cmbench.errors import MissingError, UserError
from cmbench.files import write_atomically


@dataclass(frozen=True)
class MergeResult:
    """What a merge did with the sources' cells: added, already there, replaced as not finished."""

    added: tuple[str, ...]
    equal: tuple[str, ...]
    replaced: tuple[str, ...]
    #: Why records, of the sources or the target, were left alone.
    unreadable: tuple[UserError, ...] = ()


def find_records(source: Path) -> list[Path]:
    """Return the record files of a workspace, a ``records`` folder or one dataset's folder.

    Raises:
        UserError: if ``source`` is no folder or holds no record.
    """
    if not source.is_dir():
        raise (UserError if source.exists() else MissingError)(
            "merge", f"{source} is not a folder",
            allowed="workspaces or folders of records", remedy="check the path",
        )  # fmt: skip
    root = source / "records" if (source / "records").is_dir() else source
    found = sorted([*root.glob("*.json"), *root.glob("*/*.json")])
    if not found:
        raise UserError("merge", f"{source} holds no records", remedy="check the path")
    return found


def merge(sources: Sequence[Path], target: Path) -> MergeResult:
    """Copy the records of ``sources`` with their artifacts to ``target/<dataset>/``.

    All records are read and all conflicts found before anything is written. A finished record
    replaces a failed or skipped one of the same cell; two finished ones that differ are a conflict.
    Files that cannot be read are neither copied nor replaced, and are returned with the reason.

    Raises:
        UserError: a source that holds no records, or every conflicting cell by name with both
            files.
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
            "merge", f"{len(conflicts)} conflicting cell(s): {'; '.join(conflicts)}",
            remedy="records are immutable: keep one of each and move the other away",
        )  # fmt: skip
    chosen = {key: found for key, found in chosen.items() if key in seen}
    return replace(_write(chosen, there, target), unreadable=tuple(unreadable))


def _key(record: Record) -> tuple[str, str]:
    return record.dataset.name, record.cell


def _readable(paths: Sequence[Path], unreadable: list[UserError]) -> Iterator[tuple[Path, Record]]:
    """Yield the records of ``paths``; collect the errors of the others."""
    for path in paths:
        try:
            yield path, read_record(path)
        except UserError as error:
            unreadable.append(error)


def _choose(
    path: Path, record: Record, chosen: dict[tuple[str, str], tuple[Path, Record]],
    conflicts: list[str],
) -> None:  # fmt: skip
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
    added, equal, replaced = [], [], []
    for (dataset, cell), (path, record) in chosen.items():
        name = f"{dataset}/{cell}"
        if (dataset, cell) in there:
            if there[dataset, cell][0] == path:
                equal.append(name)
                continue
            replaced.append(name)
        else:
            added.append(name)
        _copy_artifacts(path, record, target / dataset)
        write_atomically(target / dataset / f"{cell}.json", record.to_json().encode())
    return MergeResult(tuple(added), tuple(equal), tuple(replaced))


def _copy_artifacts(path: Path, record: Record, folder: Path) -> None:
    """Copy what lies beside the record; paths that leave its folder are not followed."""
    root = path.parent.resolve()
    for artifact in record.artifacts.values():
        source = (root / artifact.file).resolve()
        goal = (folder / artifact.file).resolve()
        inside = source.is_relative_to(root) and goal.is_relative_to(folder.resolve())
        if inside and source.is_file() and source != goal:
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, goal)
