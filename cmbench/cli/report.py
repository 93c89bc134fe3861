"""``cmbench report``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cmbench.cli.common import command_line
from cmbench.cli.options import workspace_option
from cmbench.cli.output import echo
from cmbench.cli.record_files import Readings, echo_unreadable, record_folders
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.leaderboard import boards
from cmbench.leaderboard.published import Published
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.records.workspace import Workspace
from cmbench.report import render
from cmbench.report.cells import path_problem
from cmbench.report.render import name_problem


def render_workspace(
    workspace: Workspace,
    datasets: Sequence[str],
    plugins: PluginManager,
    *,
    out: Path | None = None,
    templates: Path | None = None,
    leaderboards: Path | None = None,
    command: str | None = None,
) -> tuple[list[Path], list[UserError]]:
    """Render the pages of ``datasets`` (all that have records, if none is named).

    Published rows and reference records of those datasets stand beside the workspace's own; they
    are found as :func:`cmbench.leaderboard.boards.find_folder` says. The description of a board is
    left out, because it is about its own page.

    Returns:
        The files written, the page of the first dataset first, and what could not be read.
    """
    folders = record_folders(workspace, datasets)
    dataset_options = [word for name in datasets for word in ("--dataset", name)]
    shipped = boards.find_folder(leaderboards)
    loaded = boards.load_boards(shipped)
    references = boards.record_folders(shipped) if shipped is not None else {}
    return render_pages(
        folders,
        out or workspace.reports,
        plugins,
        templates=templates,
        published={n: boards.without_description(loaded[n]) for n in folders if n in loaded},
        references={name: path for name, path in references.items() if name in folders},
        command=command or shlex.join(["cmbench", "report", *dataset_options]),
    )


def render_pages(
    folders: Mapping[str, Path],
    out: Path,
    plugins: PluginManager,
    *,
    templates: Path | None,
    published: Mapping[str, Published],
    command: str,
    references: Mapping[str, Path] | None = None,
) -> tuple[list[Path], list[UserError]]:
    """Render folders of records with the columns and charts that plugins add.

    ``references`` are folders of reference records by dataset, shown beside ``folders``.
    """
    readings = Readings()
    problems = {name: name_problem(name) for name in folders}
    readings.errors += filter(None, problems.values())
    written = render(
        {name: readings.read(path, name) for name, path in folders.items() if not problems[name]},
        out,
        templates=templates,
        extra_columns=hook_columns(plugins),
        extra_charts=lambda dataset, rows: hook_charts(plugins, dataset, rows),
        published=published,
        references={
            name: readings.read(path, name)
            for name, path in (references or {}).items()
            if name in folders and not problems[name]
        },
        command=command,
    )
    return written, readings.errors


def echo_pages(written: Sequence[Path], errors: Sequence[UserError]) -> int:
    """Print the files written and what could not be read; return the exit code."""
    for path in written:
        echo(str(path))
    echo_unreadable(errors)
    return EXIT_CELLS_FAILED if errors else EXIT_OK


def hook_columns(plugins: PluginManager) -> dict[str, str]:
    """Return the columns that plugins add; a plugin that returns something else is listed."""
    columns: dict[str, str] = {}
    for found in gathered(plugins, "cmbench_report_columns", columns_problem):
        columns.update({str(title): path for title, path in found.items()})
    return columns


def columns_problem(found: Any) -> str:
    """Return what is wrong with the columns of a plugin, or an empty string."""
    if not isinstance(found, Mapping):
        return f"returned {type(found).__name__}; allowed: titles to dotted paths into a record"
    problems = (path_problem(path) for path in found.values())
    return next((f"returned {problem}" for problem in problems if problem), "")


def gathered(
    plugins: PluginManager, hook: str, problem: Callable[[Any], str], **arguments: Any
) -> list[Any]:
    """Return what plugins return from a hook; print a warning for each that is left out."""
    before = [id(info) for info in plugins.failed]
    found = plugins.gather(hook, problem, **arguments)
    for info in plugins.failed:
        if id(info) not in before:
            echo(f"warning: {info}: {info.error}", err=True)
    return found


def hook_charts(
    plugins: PluginManager, dataset: str, rows: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, str]]:
    """Yield the charts that plugins add."""
    hook = "cmbench_report_charts"
    for found in gathered(plugins, hook, charts_problem, dataset=dataset, rows=rows):
        yield from found


def charts_problem(found: Any) -> str:
    """Return what is wrong with the charts of a plugin, or an empty string."""
    if isinstance(found, list | tuple) and all(isinstance(chart, Mapping) for chart in found):
        return ""
    return f"returned {type(found).__name__}; allowed: a list of mappings with title and svg"


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
    "-O",
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
    help="Folder of published rows and reference records."
    "  [default: ./leaderboards, else cmbench's own]",
)
@workspace_option
def report(
    datasets: tuple[str, ...],
    out: Path | None,
    templates: Path | None,
    leaderboards: Path | None,
    workspace_dir: str | None,
) -> int:
    """Render records as one self-contained HTML page per dataset, Markdown, CSV and LaTeX.

    Prints the files written. Exits 1 if a record could not be read; the page lists it.
    """
    pages = render_workspace(
        Workspace.existing(workspace_dir),
        datasets,
        load_plugins(),
        out=out,
        templates=templates,
        leaderboards=leaderboards,
        command=command_line(),
    )
    return echo_pages(*pages)
