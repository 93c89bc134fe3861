"""Published rows: ``leaderboards/<dataset>/published.csv`` and ``board.toml`` beside it.

One line a row, exactly as the source prints it; where sources disagree every row stays, with a
note. The CSV's columns are the fields of :class:`PublishedRow`; ``board.toml`` names the tables
that the rows come from, with the number of rows each must have, and the protocols that their
numbers were measured under. A board without tables needs no CSV: it only gives its dataset a title
and notes. Problems are reported with file, line and field.
"""

from __future__ import annotations

import csv
import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cmbench.errors import UserError
from cmbench.leaderboard.rows import REPORTED, Measurement, Row
from cmbench.leaderboard.statistics import Interval, Unit
from cmbench.records.record import Name

ROWS_FILE = "published.csv"
BOARD_FILE = "board.toml"
SCHEMA_VERSION = 1

Family = Literal[
    "diffusion",
    "sampler",
    "distillation",
    "consistency training",
    "GAN",
    "flow",
    "VAE",
    "masked model",
    "autoregressive model",
    "energy-based model",
]
Mark = Literal[
    "synthetic pairs",
    "LPIPS-trained",
    "re-implementation",
    "teacher",
    "adversarial",
    "sample figure",
    "secondary source",
    "starred",
]
Text = Annotated[str, Field(max_length=400)]
#: A number as printed, or nothing.
Printed = Annotated[str, Field(pattern=r"^([0-9]+(\.[0-9]+)?)?$")]

#: Metric -> higher is better; the columns that hold numbers.
METRICS = {"fid": False, "is": True, "precision": True, "recall": True}
_SIZES = {"K": 1e3, "M": 1e6, "B": 1e9}


class PublishedRow(BaseModel):
    """One number (or several metrics of one sampling) as a source prints it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: Name = Field(description="table of the source, a key of board.toml's [tables]")
    block: Text = Field(description="heading inside the table")
    method: Text = Field(min_length=1, description="as printed")
    joins: Text = Field(description="name of the cmbench method that does the same; may be empty")
    reference: Text = Field(description="authors and year as printed")
    year: Annotated[int, Field(ge=1990, le=2100)] | None = Field(
        description="empty where the source does not say"
    )
    family: Family
    conditioning: Literal["conditional", "unconditional", ""] = Field(
        description="empty where the source does not say"
    )
    nfe: Annotated[str, Field(pattern=r"^[1-9][0-9]*(x[1-9][0-9]*)?$")] = Field(
        description="network evaluations an image; 63x2 where guidance doubles them"
    )
    fid: Printed
    is_: Printed = Field(alias="is")
    precision: Printed
    recall: Printed
    parameters: Annotated[str, Field(pattern=r"^([0-9]+(\.[0-9]+)?[KMB])?$")]
    marks: tuple[Mark, ...] = Field(description="separated by semicolons")
    protocol: Name = Field(description="a key of board.toml's [protocols]")
    source: Text = Field(min_length=1)
    place: Text = Field(description="where in the source")
    note: Text

    @field_validator("marks", mode="before")
    @classmethod
    def _split_marks(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(";")] if value else []

    @field_validator("year", mode="before")
    @classmethod
    def _no_year(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _plausible(self) -> PublishedRow:
        if not (self.fid or self.is_):
            raise ValueError("fid, is: a row needs at least one of them")
        for name in ("precision", "recall"):
            if getattr(self, name) and not 0 <= float(getattr(self, name)) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not between 0 and 1")
        return self

    @property
    def nfe_total(self) -> int:
        """Network evaluations with guidance: 126 for ``63x2``."""
        steps, _, factor = self.nfe.partition("x")
        return int(steps) * int(factor or 1)

    @property
    def parameter_count(self) -> int | None:
        """Parameters as a number; None where the source does not say."""
        if not self.parameters:
            return None
        return round(float(self.parameters[:-1]) * _SIZES[self.parameters[-1]])


class Table(BaseModel):
    """A table of a source; ``rows`` is how many rows it has there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    rows: int = Field(ge=1)


class Protocol(BaseModel):
    """How numbers were measured; ``key`` equals a record's metric key, or is empty."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    reason: str = Field(description="why its rows are (not) comparable with measured ones")
    key: str = ""


class Board(BaseModel):
    """What ``board.toml`` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    dataset: Name
    title: str
    rank_metric: Name
    description: str = ""
    notes: tuple[str, ...] = Field((), description="paragraphs that the page shows")
    also: tuple[Name, ...] = Field((), description="datasets whose pages show these rows too")
    tables: dict[Name, Table] = Field(default_factory=dict)
    protocols: dict[Name, Protocol] = Field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a published file, and where."""

    file: Path
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}, field {self.field!r}: {self.message}"


@dataclass(frozen=True)
class Published:
    """A valid board with its rows and the line of each."""

    board: Board
    rows: tuple[tuple[int, PublishedRow], ...]

    def as_rows(self, dataset: str | None = None) -> list[Row]:
        """Return the rows of kind ``reported`` for the leaderboard of ``dataset``."""
        return [self._row(row, dataset or self.board.dataset) for _, row in self.rows]

    def _row(self, row: PublishedRow, dataset: str) -> Row:
        protocol = self.board.protocols[row.protocol]
        table = self.board.tables[row.table]
        return Row(
            id=_identity(self.board.dataset, row),
            dataset=dataset,
            kind=REPORTED,
            method=row.joins or row.method,
            title=row.method,
            family=row.family,
            reference=row.reference,
            year=row.year or 0,
            conditional={"conditional": True, "unconditional": False}.get(row.conditioning),
            nfe=row.nfe_total,
            nfe_text=row.nfe.replace("x", "×"),
            parameters=row.parameter_count,
            rank_metric=self.board.rank_metric,
            measurements=_measurements(row, self.board.rank_metric, protocol.key),
            marks=row.marks,
            note=row.note,
            protocol=(protocol.title, protocol.reason),
            details={
                "source": row.source,
                "place": row.place,
                "table": table.title,
                "block": row.block,
                "protocol": f"{protocol.title}: {protocol.reason}",
                "marks": ", ".join(row.marks),
            },
        )


def _identity(dataset: str, row: PublishedRow) -> str:
    decides = [
        dataset,
        row.table,
        row.block,
        row.method,
        row.nfe,
        row.conditioning,
        row.fid,
        row.is_,
        row.parameters,
        ";".join(row.marks),
    ]
    return hashlib.sha256("|".join(decides).encode()).hexdigest()[:12]


def _measurements(row: PublishedRow, rank_metric: str, key: str) -> dict[str, Measurement]:
    printed = {"fid": row.fid, "is": row.is_, "precision": row.precision, "recall": row.recall}
    found = {}
    for name, text in printed.items():
        if text:
            value = float(text)
            interval = Interval(value, None, None, 0)
            # The key of the rank metric says nothing about the other metrics' protocols.
            own = key if name == rank_metric else ""
            units = (Unit(0, 0, value),)
            found[name] = Measurement(name, own, METRICS[name], interval, units, text=text)
    return found


# ---- reading ------------------------------------------------------------------------------------


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
        text = path.read_text(encoding="utf-8")
        return Board.model_validate(tomllib.loads(text))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(path, 0, "", f"cannot be read: {error}"))
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line ([0-9]+)", str(error))
        problems.append(Problem(path, int(found[1]) if found else 0, "", f"is not TOML: {error}"))
    except ValidationError as error:
        for item in error.errors():
            keys = tuple(str(part) for part in item["loc"])
            problems.append(Problem(path, _toml_line(path, keys), ".".join(keys), item["msg"]))
    return None


def _toml_line(path: Path, keys: Sequence[str]) -> int:
    """Return the line where ``keys`` (or the nearest table above it) stands in a TOML file."""
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
        text = path.read_text(encoding="utf-8")
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
        message = f"{board.rank_metric!r} is no column of {ROWS_FILE} ({', '.join(METRICS)})"
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
        identity = _identity(board.dataset, row)
        if identity in seen and row.place == dict(rows)[seen[identity]].place:
            problems.append(Problem(path, line, "method", f"repeats line {seen[identity]}"))
        seen.setdefault(identity, line)
    counts = Counter(row.table for _, row in rows)
    for name, table in board.tables.items():
        if counts[name] != table.rows:
            where = _toml_line(folder / BOARD_FILE, ("tables", name, "rows"))
            problems.append(
                Problem(
                    folder / BOARD_FILE,
                    where,
                    f"tables.{name}.rows",
                    f"the table has {table.rows} rows, {ROWS_FILE} holds {counts[name]}",
                )
            )
    return problems
