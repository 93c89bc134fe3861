"""Read ``leaderboards/<dataset>/``: problems are reported with file, line and field."""

from __future__ import annotations

import csv
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cmbench.errors import UserError
from cmbench.files import regular
from cmbench.leaderboard.published import METRICS, Board, Published, PublishedRow, identity

ROWS_FILE = "published.csv"
BOARD_FILE = "board.toml"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a published file, and where."""

    file: Path
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}, field {self.field!r}: {self.message}"


def load_published(folder: Path) -> Published:
    """Read ``folder/board.toml`` and ``folder/published.csv``.

    Raises:
        UserError: naming file, line and field of the first problem and how many more there are.
    """
    published, problems = check_published(folder)
    if published is None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            "published rows",
            f"{problems[0]}{more}",
            remedy="correct the file; `cmbench leaderboard validate` lists every problem",
        )
    return published


def check_published(folder: Path) -> tuple[Published | None, list[Problem]]:
    """Return the board and rows, or None and every problem found."""
    problems: list[Problem] = []
    board = _read_board(folder / BOARD_FILE, problems)
    rows = []
    if board is None or board.tables or (folder / ROWS_FILE).exists():
        rows = list(_read_rows(folder / ROWS_FILE, problems))
    if board is not None:
        if board.dataset != folder.name:
            problems.append(
                Problem(
                    folder / BOARD_FILE,
                    _toml_line(folder / BOARD_FILE, ("dataset",)),
                    "dataset",
                    f"{board.dataset!r}, but the folder is {folder.name!r}",
                )
            )
        problems += _check_references(folder, board, rows)
    if board is None or problems:
        return None, problems
    return Published(board, tuple(rows)), []


def _read_board(path: Path, problems: list[Problem]) -> Board | None:
    try:
        text = regular(path).read_text(encoding="utf-8")
        return Board.model_validate(tomllib.loads(text))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(path, 0, "", f"cannot be read: {error}"))
    except ValidationError as error:
        for item in error.errors():
            keys = tuple(str(part) for part in item["loc"])
            problems.append(Problem(path, _toml_line(path, keys), ".".join(keys), item["msg"]))
    except (ValueError, RecursionError) as error:
        found = re.search(r"line ([0-9]+)", str(error))
        problems.append(Problem(path, int(found[1]) if found else 0, "", f"is not TOML: {error}"))
    return None


def _toml_line(path: Path, keys: Sequence[str]) -> int:
    """Return the line of ``keys`` (or of the nearest table above) in a TOML file."""
    best, section = 1, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        if header:
            section = header[1].strip()
            if section == ".".join(keys[: section.count(".") + 1]):
                best = number
        key = re.match(r"\s*([\w-]+)\s*=", line)
        full = f"{section}.{key[1]}" if key and section else key[1] if key else ""
        if full and full == ".".join(keys[: full.count(".") + 1]):
            return number
    return best


def _read_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[int, PublishedRow]]:
    names = [f.alias or name for name, f in PublishedRow.model_fields.items()]
    try:
        text = regular(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(path, 0, "", f"cannot be read: {error}"))
        return
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        header = next(reader, [])
        if header != names:
            wrong = sorted(set(header) ^ set(names)) or ["order of columns"]
            problems.append(Problem(path, 1, wrong[0], f"the header must be {','.join(names)}"))
            return
        start = 2
        for cells in reader:
            if cells:
                yield from _read_row(path, start, dict(zip(names, cells)), len(cells), problems)
            start = reader.line_num + 1
    except csv.Error as error:
        problems.append(Problem(path, reader.line_num, "", f"is not CSV: {error}"))


def _read_row(
    path: Path, line: int, cells: dict[str, str], count: int, problems: list[Problem]
) -> Iterator[tuple[int, PublishedRow]]:
    expected = len(PublishedRow.model_fields)
    if count != expected:
        problems.append(Problem(path, line, "", f"has {count} fields instead of {expected}"))
        return
    try:
        yield line, PublishedRow.model_validate(cells)
    except ValidationError as error:
        for item in error.errors():
            field = str(item["loc"][0]) if item["loc"] else ""
            message = item["msg"].removeprefix("Value error, ")
            if not field:
                field, _, message = message.partition(": ")
            value = cells.get(field)
            given = f" (found {value!r})" if value is not None else ""
            problems.append(Problem(path, line, field, message + given))


def _check_references(
    folder: Path, board: Board, rows: Sequence[tuple[int, PublishedRow]]
) -> list[Problem]:
    path = folder / ROWS_FILE
    problems = []
    if rows and board.rank_metric not in METRICS:
        where = _toml_line(folder / BOARD_FILE, ("rank_metric",))
        message = f"{board.rank_metric!r} is not a column of {ROWS_FILE} ({', '.join(METRICS)})"
        problems.append(Problem(folder / BOARD_FILE, where, "rank_metric", message))
    seen: dict[str, int] = {}
    for line, row in rows:
        for field, known in (("table", board.tables), ("protocol", board.protocols)):
            name = getattr(row, field)
            if name not in known:
                allowed = ", ".join(known)
                problems.append(
                    Problem(path, line, field, f"{name!r} is not in {BOARD_FILE} ({allowed})")
                )
        own = identity(board.dataset, row)
        if own in seen and row.place == dict(rows)[seen[own]].place:
            problems.append(Problem(path, line, "method", f"repeats line {seen[own]}"))
        seen.setdefault(own, line)
    problems += check_papers([(path, line, row) for line, row in rows])
    counts = Counter(row.table for _, row in rows)
    for name, table in board.tables.items():
        if counts[name] != table.rows:
            where = _toml_line(folder / BOARD_FILE, ("tables", name, "rows"))
            problems.append(
                Problem(
                    folder / BOARD_FILE,
                    where,
                    f"tables.{name}.rows",
                    f"the table has {table.rows} rows, {ROWS_FILE} has {counts[name]}",
                )
            )
    return problems


def check_papers(rows: Iterable[tuple[Path, int, PublishedRow]]) -> list[Problem]:
    """Return a problem for every row whose paper has another reference in an earlier row.

    Args:
        rows: file, line and row; of one board, or of all boards.
    """
    first: dict[str, tuple[Path, int, str]] = {}
    problems = []
    for path, line, row in rows:
        if row.arxiv:
            where, number, reference = first.setdefault(row.arxiv, (path, line, row.reference))
            if reference != row.reference:
                message = f"arXiv {row.arxiv} is {reference!r} in {where} line {number}"
                problems.append(
                    Problem(path, line, "reference", f"{message} (found {row.reference!r})")
                )
    return problems
