"""Finding records: those of datasets, or one that the user names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cmbench.cli.output import echo_line
from cmbench.errors import MissingError, UserError, first_names
from cmbench.records.folders import ReadRecord, hidden_files, read_records, record_files
from cmbench.records.workspace import Workspace


class Readings:
    """Reads records and keeps the errors of those that cannot be read."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def read(self, folder: Path, dataset: str) -> Iterator[ReadRecord]:
        """Yield what ``read_records`` finds."""
        for path, found in read_records(folder, dataset):
            if isinstance(found, UserError):
                self.errors.append(found)
            yield path, found


def echo_unreadable(errors: Sequence[UserError]) -> None:
    """Print one line to stderr for each record that could not be read."""
    for error in errors:
        echo_line(f"unreadable: {error}", err=True)


def echo_hidden(folders: Iterable[Path]) -> None:
    """Say once, on stderr, that files whose names begin with a dot are not read."""
    names = [path.name for folder in folders for path in hidden_files(folder)]
    if names:
        echo_line(f"not read: {len(names)} hidden file(s), such as {names[0]}", err=True)


def record_folders(workspace: Workspace, datasets: Sequence[str] = ()) -> dict[str, Path]:
    """Return the folders of records by dataset; raise ``UserError`` for one without records."""
    known = {p.name: p for p in sorted(workspace.all_records.glob("[!.]*")) if p.is_dir()}
    echo_hidden(known.values())
    for name in datasets:
        if name not in known:
            raise UserError(
                "--dataset",
                f"no records of {name!r} in {workspace.all_records}",
                allowed=", ".join(known) or "none yet",
                remedy="see `cmbench run`",
            )
    return {name: known[name] for name in datasets} if datasets else known


def find_record(workspace: Workspace, name: str, who: str) -> Path:
    """Return the record file that ``name`` means: a path, a cell, or the start of one cell."""
    if name.endswith(".json") and Path(name).is_file():
        return Path(name)
    if name.endswith((".json", ".zip")):  # no cell has such a name
        raise MissingError(who, f"file {name} does not exist", remedy="check the path")
    files = record_files(workspace.all_records, "*/*.json")
    matches = [f for f in files if f.stem == name] or [f for f in files if f.stem.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    some = first_names([f.stem for f in matches or files], 5) or "no records yet"
    problem = f"{name!r} matches {len(matches)} records" if matches else f"no record {name!r}"
    raise UserError(
        who,
        problem,
        allowed=some,
        remedy="give a cell's full name: a file name in the folder records, without .json",
    )
