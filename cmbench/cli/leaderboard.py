"""``cmbench leaderboard``: the boards that are checked in."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cmbench.cli.best import print_groups, print_page, print_rows_at
from cmbench.cli.common import echo_table
from cmbench.cli.options import json_option
from cmbench.cli.output import echo
from cmbench.cli.record_files import Readings
from cmbench.cli.report import echo_pages, render_pages
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, EXIT_USAGE, UserError, unknown_name
from cmbench.leaderboard import boards
from cmbench.leaderboard.published import PublishedRow
from cmbench.leaderboard.published_files import (
    ROWS_FILE,
    Problem,
    check_papers,
    check_published,
    load_published,
)
from cmbench.leaderboard.reproducible import check_commands, read_entries
from cmbench.plugin.manager import load_plugins
from cmbench.records.folders import record_files
from cmbench.report.page import build_page

_FOLDER = click.argument(
    "folder", required=False, type=click.Path(path_type=Path, file_okay=False), metavar="[DIR]"
)


@click.group()
def leaderboard() -> None:
    """Check and render leaderboards: published rows and reference records.

    DIR holds one folder per dataset with board.toml, published.csv and records/; the default is
    ./leaderboards.
    """


def _folder(given: Path | None) -> Path:
    found = boards.find_folder(given)
    if found is None:
        raise UserError(
            "leaderboard", "folder ./leaderboards does not exist", remedy="give the folder"
        )
    return found


@leaderboard.command()
@_FOLDER
def validate(folder: Path | None) -> int:
    """Check every published row; exits 2 and prints file, line and field of each problem.

    Checked are names, numbers, references (authors, year, arXiv number; one paper has one
    reference on all boards), repeated rows, the number of rows of each table, and that
    commands.toml, where there is one, has an entry for every row.
    """
    found = _folder(folder)
    problems = 0
    folders = boards.board_folders(found)
    if not folders:
        raise UserError(
            "leaderboard",
            f"{found} has no board",
            allowed="<dataset>/board.toml",
            remedy="give the folder of the boards",
        )
    valid: list[tuple[Path, int, PublishedRow]] = []
    for path in folders:
        published, errors = check_published(path)
        if published is not None:
            errors += check_commands(path, published)
            valid += [(path / ROWS_FILE, line, row) for line, row in published.rows]
            counts = f"{len(published.rows)} rows in {len(published.board.tables)} tables"
            echo(f"{path.name}: {counts}")
        problems += _echo_problems(errors)
    problems += _echo_problems(check_papers(valid))
    return EXIT_USAGE if problems else EXIT_OK


def _echo_problems(problems: list[Problem]) -> int:
    for problem in problems:
        echo(str(problem), err=True)
    return len(problems)


@leaderboard.command("list")
@_FOLDER
def list_(folder: Path | None) -> int:
    """List the boards with their published rows and reference records."""
    found = _folder(folder)
    records = boards.record_folders(found)
    lines = []
    for path in boards.board_folders(found):
        published = load_published(path)
        count = len(record_files(records[path.name])) if path.name in records else 0
        lines.append([path.name, str(len(published.rows)), str(count), published.board.title])
    echo_table(["dataset", "published", "records", "title"], lines, prose=("title",))
    return EXIT_OK


@leaderboard.command()
@click.argument("dataset")
@_FOLDER
@click.option("--nfe", metavar="N", type=click.IntRange(min=1), help="Only this NFE, all columns.")
def show(dataset: str, folder: Path | None, nfe: int | None) -> int:
    """Show what may be the best of DATASET at each NFE, and methods by NFE.

    With --nfe, every row of that NFE, published and measured, with as many columns as fit.
    """
    found = _folder(folder)
    loaded, records = boards.load_boards(found), boards.record_folders(found)
    if dataset not in loaded and dataset not in records:
        known = {*loaded, *records}
        raise unknown_name("cmbench leaderboard show", "dataset", dataset, known)
    readings = Readings()
    cells = readings.read(records[dataset], dataset) if dataset in records else ()
    page = build_page(dataset, cells, loaded.get(dataset), {}, "")
    if nfe is None:
        print_page(page)
    else:
        print_groups([group for group in page.groups if group.nfe == nfe], page.rows)
        print_rows_at(page, nfe)
    return EXIT_CELLS_FAILED if readings.errors else EXIT_OK


@leaderboard.command()
@click.argument("dataset")
@_FOLDER
@json_option
def commands(dataset: str, folder: Path | None, as_json: bool) -> int:
    """Say for every published row of DATASET what reproduces it, or why no recipe does.

    With command, parameters, images and GPU-hours, which are counted on no data in seconds per
    recipe.
    """
    loaded = boards.load_boards(_folder(folder))
    if dataset not in loaded:
        raise unknown_name("cmbench leaderboard commands", "board", dataset, loaded)
    published = loaded[dataset]
    entries = read_entries(_folder(folder) / published.board.dataset)

    from cmbench.cli.board_commands import answers, as_objects, print_answers  # imports torch

    found = answers(load_plugins(), published, entries)
    if as_json:
        echo(json.dumps(as_objects(found), indent=1))
    else:
        print_answers(dataset, found)
    return EXIT_OK


@leaderboard.command("render")
@_FOLDER
@click.option(
    "--out",
    metavar="DIR",
    default=Path("reports"),
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write to.",
)
@click.option(
    "--template",
    "templates",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder whose files replace built-in templates of the same name.",
)
def render_boards(folder: Path | None, out: Path, templates: Path | None) -> int:
    """Render the pages of every board from its published rows and reference records."""
    found = _folder(folder)
    loaded = boards.load_boards(found)
    records = boards.record_folders(found)
    names = sorted({path.name for path in boards.board_folders(found)} | set(records))
    pages = render_pages(
        {name: records[name] for name in names if name in records},
        out,
        load_plugins(),
        templates=templates,
        published={name: loaded[name] for name in names if name in loaded},
        command="cmbench leaderboard render",
    )
    return echo_pages(*pages)
