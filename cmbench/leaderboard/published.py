"""Published rows: ``leaderboards/<dataset>/published.csv`` and ``board.toml`` beside it.

One line per row, exactly as the source prints it; if sources disagree every row is kept, with a
note. The CSV's columns are the fields of :class:`PublishedRow`; ``board.toml`` names the tables
that the rows come from, with the number of rows each must have, and the protocols that their
numbers were measured under. A board without tables needs no CSV: it only gives its dataset a title
and notes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cmbench.leaderboard.rows import REPORTED, MetricSummary, Row
from cmbench.leaderboard.statistics import Interval, Unit
from cmbench.records.fields import Name

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
    "flow map",
    "drifting",
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
Printed = Annotated[str, Field(pattern=r"^([0-9]{1,12}(\.[0-9]{1,12})?)?$")]

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
    reference: Annotated[str, Field(max_length=400, pattern=r"^.+, (19|20)[0-9]{2}$")] = Field(
        description="authors and year: Song et al., 2020"
    )
    arxiv: Annotated[str, Field(pattern=r"^([0-9]{2}(0[1-9]|1[0-2])\.[0-9]{4,5})?$")] = Field(
        description="number of the paper on arXiv; empty if it is not there"
    )
    year: Annotated[int, Field(ge=1990, le=2100)]
    family: Family
    conditioning: Literal["conditional", "unconditional", ""] = Field(
        description="empty if the source does not say"
    )
    nfe: Annotated[str, Field(pattern=r"^([1-9][0-9]{0,8}(x[1-9][0-9]{0,3})?)?$")] = Field(
        description="network evaluations per image; 63x2 if guidance doubles them; empty if the "
        "source does not say"
    )
    fid: Printed
    is_: Printed = Field(alias="is")
    precision: Printed
    recall: Printed
    parameters: Annotated[str, Field(pattern=r"^([0-9]{1,12}(\.[0-9]{1,12})?[KMB])?$")]
    marks: tuple[Mark, ...] = Field(description="separated by semicolons")
    protocol: Name = Field(description="a key of board.toml's [protocols]")
    source: Text = Field(min_length=1)
    place: Text = Field(description="where in the source")
    note: Text

    @field_validator("marks", mode="before")
    @classmethod
    def _split_marks(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(";")] if value else []

    @model_validator(mode="after")
    def _plausible(self) -> PublishedRow:
        if not (self.fid or self.is_):
            raise ValueError("fid, is: a row needs at least one of them")
        for name in ("precision", "recall"):
            if getattr(self, name) and not 0 <= float(getattr(self, name)) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not between 0 and 1")
        if not self.reference.endswith(f", {self.year}"):
            raise ValueError(f"year: {self.year} is not the year of reference {self.reference!r}")
        if self.arxiv and 2000 + int(self.arxiv[:2]) > self.year:
            raise ValueError(f"arxiv: {self.arxiv} is later than the year of its row, {self.year}")
        return self

    @property
    def nfe_total(self) -> int | None:
        """Network evaluations with guidance: 126 for ``63x2``; None if the source does not say."""
        if not self.nfe:
            return None
        steps, _, factor = self.nfe.partition("x")
        return int(steps) * int(factor or 1)

    @property
    def parameter_count(self) -> int | None:
        """Parameters as a number; None if the source does not say."""
        if not self.parameters:
            return None
        return round(float(self.parameters[:-1]) * _SIZES[self.parameters[-1]])


class SourceTable(BaseModel):
    """A table of a source; ``rows`` is how many rows it has there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    rows: int = Field(ge=1)


class ReportedProtocol(BaseModel):
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
    tables: dict[Name, SourceTable] = Field(default_factory=dict)
    protocols: dict[Name, ReportedProtocol] = Field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A valid board with its rows and the line of each."""

    board: Board
    rows: tuple[tuple[int, PublishedRow], ...]

    def as_rows(self, dataset: str | None = None) -> list[Row]:
        """Return the rows of kind ``reported`` for the leaderboard of ``dataset``.

        A result that several tables print alike is one row with all its places.
        """
        groups = grouped([row for _, row in self.rows])
        return [self._row(group, dataset or self.board.dataset) for group in groups]

    def _row(self, group: Sequence[PublishedRow], dataset: str) -> Row:
        row = combined(group)
        protocol = self.board.protocols[row.protocol]
        tables = dict.fromkeys(self.board.tables[r.table].title for r in group)
        return Row(
            id=identity(self.board.dataset, group[0]),
            dataset=dataset,
            kind=REPORTED,
            method=row.joins or row.method,
            title=row.method,
            family=row.family,
            reference=row.reference,
            arxiv=row.arxiv,
            year=row.year,
            conditional={"conditional": True, "unconditional": False}.get(row.conditioning),
            nfe=row.nfe_total,
            nfe_text=row.nfe.replace("x", "×") or "not stated",
            parameters=row.parameter_count,
            rank_metric=self.board.rank_metric,
            measurements=_measurements(row, self.board.rank_metric, protocol.key),
            marks=row.marks,
            note=row.note,
            protocol=(protocol.title, protocol.reason),
            tables=tuple(tables),
            details={
                "arXiv": row.arxiv,
                "source": row.source,
                "place": row.place,
                "table": "; ".join(tables),
                "block": row.block,
                "protocol": f"{protocol.title}: {protocol.reason}",
                "marks": ", ".join(row.marks),
            },
        )


#: Marks of the place where a row was read, not of the result.
_OF_THE_PLACE = {"sample figure", "secondary source"}
#: Rows that differ in these marks are different results.
_OF_THE_RESULT = {"teacher", "re-implementation"}


def grouped(rows: Sequence[PublishedRow]) -> list[list[PublishedRow]]:
    """Return the rows in groups of one result each, in the order of their first rows.

    Equal are method, paper, FID and protocol; everything else agrees wherever both rows have it.
    """
    groups: list[list[PublishedRow]] = []
    for row in rows:
        for group in groups:
            if all(_same_result(row, other) for other in group):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _same_result(one: PublishedRow, other: PublishedRow) -> bool:
    for name in ("method", "reference", "arxiv", "protocol"):
        if getattr(one, name) != getattr(other, name):
            return False
    if not (one.fid and other.fid) or float(one.fid) != float(other.fid):
        return False
    for name in ("conditioning", "nfe", "is_", "precision", "recall", "parameters"):
        first, second = getattr(one, name), getattr(other, name)
        if first and second and first != second:
            return False
    return _OF_THE_RESULT & set(one.marks) == _OF_THE_RESULT & set(other.marks)


def combined(group: Sequence[PublishedRow]) -> PublishedRow:
    """Return what the rows of one result say together: texts joined, marks united."""
    first = group[0]
    if len(group) == 1:
        return first
    filled = {
        name: next((value for row in group if (value := getattr(row, name))), "")
        for name in ("joins", "conditioning", "nfe", "is_", "precision", "recall", "parameters")
    }
    texts = {
        name: "; ".join(dict.fromkeys(text for row in group if (text := getattr(row, name))))
        for name in ("source", "place", "block")
    }
    note = " ".join(dict.fromkeys(row.note for row in group if row.note))
    marks = dict.fromkeys(mark for row in group for mark in row.marks)
    kept = [m for m in marks if m not in _OF_THE_PLACE or all(m in row.marks for row in group)]
    return first.model_copy(update={**filled, **texts, "note": note, "marks": tuple(kept)})


def identity(dataset: str, row: PublishedRow) -> str:
    """Return the id of a row: a hash of what sets it apart from the others of its board."""
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


def _measurements(row: PublishedRow, rank_metric: str, key: str) -> dict[str, MetricSummary]:
    printed = {"fid": row.fid, "is": row.is_, "precision": row.precision, "recall": row.recall}
    found = {}
    for name, text in printed.items():
        if text:
            value = float(text)
            interval = Interval(value, None, None, 0)
            # The key of the rank metric says nothing about the other metrics' protocols.
            own = key if name == rank_metric else ""
            units = (Unit(0, 0, value),)
            found[name] = MetricSummary(name, own, METRICS[name], interval, units, text=text)
    return found
