"""Finding boards: ``leaderboards/<dataset>/`` with published rows and reference records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cmbench
from cmbench.errors import UserError
from cmbench.leaderboard.published import Published
from cmbench.leaderboard.published_files import BOARD_FILE, load_published

FOLDER = "leaderboards"
#: What the folder is called beside an installed package.
INSTALLED = "cmbench_leaderboards"
#: Reference records of a board, in the layout of a workspace's records.
RECORDS = "records"


def find_folder(given: Path | None = None) -> Path | None:
    """Return the folder of boards: the one given, ``./leaderboards``, or cmbench's own.

    Raises:
        UserError: if the folder given does not exist.
    """
    if given is not None:
        if not given.is_dir():
            raise UserError(
                f"leaderboards folder {given}",
                "is not a folder",
                allowed=f"a folder with <dataset>/{BOARD_FILE}",
                remedy="check --leaderboards",
            )
        return given
    beside = Path(cmbench.__file__).resolve().parents[1]
    for folder in (Path(FOLDER), beside / FOLDER, beside / INSTALLED):
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    return None


def board_folders(folder: Path) -> list[Path]:
    """Return the folders of ``folder`` that hold a board, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{BOARD_FILE}"))


def record_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of reference records by dataset."""
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{RECORDS}")) if path.is_dir()}


def load_boards(folder: Path | None) -> dict[str, Published]:
    """Return the boards by dataset, ``also`` included; raise ``UserError`` for an invalid one."""
    boards: dict[str, Published] = {}
    for path in board_folders(folder) if folder is not None else []:
        published = load_published(path)
        for name in (published.board.dataset, *published.board.also):
            boards[name] = published
    return boards


def without_description(published: Published) -> Published:
    """Return a board for a page of other records: its description is about its own ones."""
    return replace(published, board=published.board.model_copy(update={"description": ""}))
