"""Merge folders of records: equal ones once, conflicting ones refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmbench.bench.record import Record, read_record
from cmbench.errors import UserError
from cmbench.files import write_atomically


@dataclass(frozen=True)
class MergeResult:
    """What a merge did: cells added, already there, and replaced because they had not finished."""

    added: tuple[str, ...]
    equal: tuple[str, ...]
    replaced: tuple[str, ...]


def find_records(source: Path) -> list[Path]:
    """Return the record files of a workspace, a ``records`` folder or one dataset's folder.

    Raises:
        UserError: if ``source`` is no folder or holds no record.
    """
    if not source.is_dir():
        raise UserError(
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

    Raises:
        UserError: an unreadable record, or every conflicting cell by name with both files.
    """
    chosen: dict[tuple[str, str], tuple[Path, Record]] = {}
    conflicts: list[str] = []
    files = sorted(target.glob("*/*.json")) if target.is_dir() else []
    there = {}
    for path in files:
        record = read_record(path)
        there[record.dataset.name, record.cell] = chosen[record.dataset.name, record.cell] = (
            path, record,
        )  # fmt: skip
    for source in sources:
        for path in find_records(source):
            _choose(path, read_record(path), chosen, conflicts)
    if conflicts:
        raise UserError(
            "merge", f"{len(conflicts)} conflicting cell(s): {'; '.join(conflicts)}",
            remedy="records are immutable: keep one of each and move the other away",
        )  # fmt: skip
    return _write(chosen, there, target)


def _choose(
    path: Path, record: Record, chosen: dict[tuple[str, str], tuple[Path, Record]],
    conflicts: list[str],
) -> None:  # fmt: skip
    key = (record.dataset.name, record.cell)
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
