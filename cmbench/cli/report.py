"""``cmbench report``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cmbench.cli.main import workspace_option
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.leaderboard import boards
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.records.record import Record, read_records
from cmbench.records.workspace import Workspace
from cmbench.report import render


class Counted:
    """Passes records on and keeps the errors that stood in their place."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def read(self, folder: Path) -> Iterator[tuple[Path, Record | UserError]]:
        """Yield what ``read_records`` finds."""
        for path, found in read_records(folder):
            if isinstance(found, UserError):
                self.errors.append(found)
            yield path, found


def render_workspace(
    workspace: Workspace,
    datasets: Sequence[str],
    plugins: PluginManager,
    *,
    out: Path | None = None,
    templates: Path | None = None,
    leaderboards: Path | None = None,
    command: str | None = None,
    counted: Counted | None = None,
) -> list[Path]:
    """Render the pages of ``datasets`` (all that have records, if none is named).

    Published rows of those datasets are found as :func:`cmbench.leaderboard.boards.find_folder`
    says; what a board says of its own reference records is left out.

    Returns:
        The files written; the first is the page of the first dataset.
    """
    counted = counted or Counted()
    names = list(datasets) or sorted(p.name for p in workspace.all_records.glob("*") if p.is_dir())
    loaded = boards.load_boards(boards.find_folder(leaderboards))
    published = {name: boards.without_description(loaded[name]) for name in names if name in loaded}
    return render(
        {name: counted.read(workspace.records(name)) for name in names},
        out or workspace.reports,
        templates=templates,
        extra_columns=hook_columns(plugins),
        extra_charts=lambda dataset, rows: hook_charts(plugins, dataset, rows),
        published=published,
        command=command or shlex.join(["cmbench", "report", *_dataset_options(datasets)]),
    )


def hook_columns(plugins: PluginManager) -> dict[str, str]:
    """Return the columns that plugins add; a plugin that returns something else is listed."""
    columns: dict[str, str] = {}
    for found in plugins.gather("cmbench_report_columns"):
        if isinstance(found, Mapping):
            columns.update({str(title): str(path) for title, path in found.items()})
    return columns


def hook_charts(
    plugins: PluginManager, dataset: str, rows: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, str]]:
    """Yield the charts that plugins add."""
    for found in plugins.gather("cmbench_report_charts", dataset=dataset, rows=rows):
        if isinstance(found, Iterable):
            yield from (chart for chart in found if isinstance(chart, Mapping))


def _dataset_options(datasets: Sequence[str]) -> list[str]:
    return [part for name in datasets for part in ("--dataset", name)]


def command_line() -> str:
    """Return the command as the user typed it, with the program's plain name."""
    return shlex.join(["cmbench", *sys.argv[1:]])


@click.command()
@click.option(
    "--dataset",
    "-d",
    "datasets",
    metavar="D",
    multiple=True,
    help="Only this dataset; may be repeated.  [default: all with records]",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write to.  [default: reports in the workspace]",
)
@click.option(
    "--template",
    "templates",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder whose files replace built-in templates of the same name.",
)
@click.option(
    "--leaderboards",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of published rows.  [default: ./leaderboards, else cmbench's own]",
)
@workspace_option
def report(
    datasets: tuple[str, ...],
    out: Path | None,
    templates: Path | None,
    leaderboards: Path | None,
    workspace: str | None,
) -> int:
    """Render records as one self-contained HTML page a dataset, Markdown, CSV and LaTeX.

    Prints the files written. Exits 1 if a record could not be read: the page lists it.
    """
    place = Workspace.existing(workspace)
    plugins = load_plugins()
    for name in datasets:
        if not place.records(name).is_dir():
            known = sorted(p.name for p in place.all_records.glob("*") if p.is_dir())
            raise UserError(
                "--dataset",
                f"no records of {name!r} in {place.all_records}",
                allowed=", ".join(known) or "none yet",
                remedy="see `cmbench run`",
            )
    counted = Counted()
    written = render_workspace(
        place,
        datasets,
        plugins,
        out=out,
        templates=templates,
        leaderboards=leaderboards,
        command=command_line(),
        counted=counted,
    )
    for path in written:
        click.echo(str(path))
    for error in counted.errors:
        click.echo(f"unreadable: {error}", err=True)
    return EXIT_CELLS_FAILED if counted.errors else EXIT_OK
