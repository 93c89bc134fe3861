"""Which recipe reproduces which published row: ``leaderboards/<dataset>/commands.toml``.

The first entry that selects a row says either what to run or why nothing can be run. Methods and
recipes are names in this file only, so boards and methods of plugins need no code.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cmbench.errors import UserError
from cmbench.files import regular
from cmbench.leaderboard.published import Family, Mark, Published, PublishedRow, Text
from cmbench.leaderboard.published_files import ROWS_FILE, Problem
from cmbench.records.fields import Name

COMMANDS_FILE = "commands.toml"


class RecipeRun(BaseModel):
    """A training that ``cmbench run`` carries out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Name
    recipe: Name
    dataset: Name | None = Field(None, description="the board's own if not given")
    options: tuple[str, ...] = Field((), description="overrides KEY=VALUE")
    sampler: Name | None = None


class CommandEntry(BaseModel):
    """Rows, selected by every field that is given, and how to reproduce them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    published: tuple[Text, ...] = Field((), description="methods as printed")
    families: tuple[Family, ...] = ()
    tables: tuple[Name, ...] = Field((), description="keys of board.toml's [tables]")
    nfe: tuple[str, ...] = Field((), description="as printed")
    conditioning: Literal["conditional", "unconditional"] | None = None
    fid: tuple[str, ...] = Field((), description="as printed")
    marks: tuple[Mark, ...] = Field((), description="marks that the row must have, among others")
    run: RecipeRun | None = None
    reason: Text = Field("", description="why no recipe reproduces it, and what to do instead")
    note: Text = Field("", description="in what the recipe differs from the source")

    @model_validator(mode="after")
    def _one_answer(self) -> CommandEntry:
        if (self.run is None) == (not self.reason):
            raise ValueError("give either run or reason")
        if not (self.published or self.families):
            raise ValueError("published, families: select rows by one of them")
        return self

    def selects(self, row: PublishedRow) -> bool:
        """Return whether this entry is about the row."""
        chosen = (
            (self.published, row.method),
            (self.families, row.family),
            (self.tables, row.table),
            (self.nfe, row.nfe),
            (self.fid, row.fid),
        )
        if any(allowed and value not in allowed for allowed, value in chosen):
            return False
        return self.conditioning in (None, row.conditioning) and {*self.marks} <= {*row.marks}


class _CommandsFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[CommandEntry, ...] = ()


def read_entries(folder: Path) -> tuple[CommandEntry, ...]:
    """Return the entries of a board's file; none if it has no such file.

    Raises:
        UserError: the file cannot be read, or an entry is wrong.
    """
    path = folder / COMMANDS_FILE
    if not path.exists():
        return ()
    try:
        text = regular(path).read_text(encoding="utf-8")
        return _CommandsFile.model_validate(tomllib.loads(text)).rows
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"]
    except (OSError, ValueError, RecursionError) as error:
        where, message = "", str(error)
    raise UserError(f"{path}", f"{where}: {message}" if where else message, remedy="correct it")


def entries_of(
    published: Published, entries: Sequence[CommandEntry]
) -> list[tuple[PublishedRow, CommandEntry | None]]:
    """Return every published row with the first entry that selects it, None without one."""
    return [
        (row, next((entry for entry in entries if entry.selects(row)), None))
        for _, row in published.rows
    ]


def check_commands(folder: Path, published: Published) -> list[Problem]:
    """Return what is wrong with a board's commands: rows without an entry, entries without a row.

    A board may have no such file.
    """
    path = folder / COMMANDS_FILE
    try:
        entries = read_entries(folder)
    except UserError as error:
        return [Problem(path, 0, "rows", str(error))]
    if not path.exists():
        return []
    answered = entries_of(published, entries)
    used = {id(entry) for _, entry in answered}
    problems = [
        Problem(path, 0, f"rows.{i}", f"selects no row of {ROWS_FILE} that is left to it")
        for i, entry in enumerate(entries, 1)
        if id(entry) not in used
    ]
    for (line, row), (_, entry) in zip(published.rows, answered, strict=True):
        if entry is None:
            message = f"no entry of {COMMANDS_FILE} selects {row.method!r} at NFE {row.nfe or '-'}"
            problems.append(Problem(folder / ROWS_FILE, line, "method", message))
        elif entry.run is not None and not row.nfe.isdecimal() and row.nfe:
            message = f"{row.method!r} at NFE {row.nfe} has guidance, which no run has"
            problems.append(Problem(folder / ROWS_FILE, line, "nfe", message))
    return problems


def command_line(run: RecipeRun, dataset: str, nfe: str) -> str:
    """Return the shell command that trains and samples a row; ``nfe`` may be empty."""
    words = ["cmbench", "run", "--method", run.method, "--dataset", run.dataset or dataset]
    words += ["--recipe", run.recipe]
    words += ["--nfe", nfe] if nfe else []
    words += ["--sampler", run.sampler] if run.sampler else []
    for option in run.options:
        words += ["-o", option]
    return shlex.join(words)
