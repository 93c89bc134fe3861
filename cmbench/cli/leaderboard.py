"""``cmbench leaderboard``: the boards that are checked in."""

from __future__ import annotations

from pathlib import Path

import click

from cmbench.cli.report import Counted, hook_charts, hook_columns
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, EXIT_USAGE, UserError
from cmbench.leaderboard import boards
from cmbench.leaderboard.published import check_published
from cmbench.plugin.manager import load_plugins
from cmbench.report import render

_FOLDER = click.argument(
    "folder", required=False, type=click.Path(path_type=Path, file_okay=False), metavar="[DIR]"
)


@click.group()
def leaderboard() -> None:
    """Check and render leaderboards: published rows and reference records.

    DIR holds one folder a dataset with board.toml, published.csv and records/; it is ./leaderboards
    by default.
    """


def _folder(given: Path | None) -> Path:
    found = boards.find_folder(given)
    if found is None:
        raise UserError(
            "leaderboard", "there is no folder ./leaderboards", remedy="name the folder"
        )
    return found


@leaderboard.command()
@_FOLDER
def validate(folder: Path | None) -> int:
    """Check every published row; exit 2 with file, line and field of each problem."""
    found = _folder(folder)
    problems = 0
    folders = boards.board_folders(found)
    if not folders:
        raise UserError(
            "leaderboard", f"{found} holds no board", allowed="<dataset>/board.toml",
            remedy="name the folder",
        )  # fmt: skip
    for path in folders:
        published, errors = check_published(path)
        problems += len(errors)
        for error in errors:
            click.echo(str(error), err=True)
        if published is not None:
            counts = f"{len(published.rows)} rows in {len(published.board.tables)} tables"
            click.echo(f"{path.name}: {counts}")
    return EXIT_USAGE if problems else EXIT_OK


@leaderboard.command("render")
@_FOLDER
@click.option("--out", metavar="DIR", default=Path("reports"), show_default=True,
              type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
@click.option("--template", "templates", metavar="DIR",
              type=click.Path(path_type=Path, file_okay=False),
              help="Folder whose files replace built-in templates of the same name.")
def render_boards(folder: Path | None, out: Path, templates: Path | None) -> int:
    """Render the pages of every board from its published rows and reference records."""
    found = _folder(folder)
    loaded = boards.load_boards(found)
    records = boards.record_folders(found)
    own = {path.name for path in boards.board_folders(found)}
    names = sorted(own | set(records))
    plugins = load_plugins()
    counted = Counted()
    written = render(
        {name: counted.read(records[name]) for name in names if name in records},
        out,
        templates=templates,
        extra_columns=hook_columns(plugins),
        extra_charts=lambda dataset, rows: hook_charts(plugins, dataset, rows),
        published={name: loaded[name] for name in names if name in loaded},
        command="cmbench leaderboard render",
    )
    for path in written:
        click.echo(str(path))
    for error in counted.errors:
        click.echo(f"unreadable: {error}", err=True)
    return EXIT_CELLS_FAILED if counted.errors else EXIT_OK
