"""Folders of records: what is in them, and what only looks like it.

``records/<dataset>/<cell>.json``. A record of a cell that was measured again elsewhere, with an
equal result, lies in ``records/<dataset>/reproductions/<hash>/<cell>.json``: evidence, not a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cmbench.errors import UserError
from cmbench.records.record import Record, read_record

#: A file and the record in it, or why it cannot be read.
ReadRecord = tuple[Path, Record | UserError]

REPRODUCTIONS = "reproductions"


def record_files(folder: Path, pattern: str = "*.json") -> list[Path]:
    """Return the files of records in ``folder``, by name.

    Names that begin with a dot are not ours: macOS leaves ``._name.json`` beside copied files.
    """
    return sorted(p for p in folder.glob(pattern) if not _hidden(p.relative_to(folder)))


def hidden_files(folder: Path) -> list[Path]:
    """Return the ``.json`` files of ``folder`` whose names begin with a dot."""
    return sorted(folder.glob(".*.json"))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_cell(path: Path, dataset: str | None = None) -> Record:
    """Read a record that lies where it belongs: named after its cell, beside those of its dataset.

    Raises:
        UserError: it does not, so it may be a copy, or cannot be read.
    """
    record = read_record(path)
    if path.stem != record.cell:
        raise UserError(
            f"record {path}",
            f"has the cell {record.cell!r}, which is not its name",
            allowed=f"{record.cell}.json",
            remedy="rename the file, or delete it if it is a copy",
        )
    if dataset not in (None, record.dataset.name):
        raise UserError(
            f"record {path}",
            f"is of dataset {record.dataset.name!r}",
            allowed=f"records of {dataset!r} in this folder",
            remedy=f"move it to the folder {record.dataset.name}",
        )
    return record


def read_records(folder: Path, dataset: str | None = None) -> Iterator[ReadRecord]:
    """Yield the records of a folder in name order, each a record or its error.

    Args:
        folder: of one dataset.
        dataset: the one that the records must be of, where it is known.
    """
    for path in record_files(folder):
        try:
            yield path, read_cell(path, dataset)
        except UserError as error:
            yield path, error


def reproductions(path: Path) -> list[Path]:
    """Return the records of the cell of ``path`` that were measured again elsewhere."""
    return record_files(path.parent / REPRODUCTIONS, f"*/{path.name}")
