"""``cmbench study``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmbench.cli.common import (
    ContextOptions,
    context_options,
    echo_table,
    make_context,
    stop_asker,
    takes,
    time_limit_option,
)
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.files import write_atomically
from cmbench.plugin.manager import load_plugins

if TYPE_CHECKING:
    from cmbench.records.studies import StudyResult


@dataclass(frozen=True, kw_only=True)
class StudyOptions(ContextOptions):
    """What the user asked of `cmbench study`."""

    name: str | None
    listing: bool
    output: Path | None
    no_plot: bool
    time_limit_s: float | None


@click.command("study")
@click.argument("name", required=False)
@click.option("--list", "listing", is_flag=True, help="List the studies.")
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of the page and its plots.  [default: WORKSPACE/studies]",
)
@click.option("--no-plot", is_flag=True, help="Write tables only; needs no matplotlib.")
@time_limit_option
@context_options
@takes(StudyOptions)
def study(options: StudyOptions) -> int:
    """Repeat a comparison: run its arms, then write a table and plots.

    NAME is one of `cmbench study --list`, or your own .toml file. Arms that are already measured
    are not run again.

    \b
    cmbench study --list
    cmbench study NAME
    """
    plugins = load_plugins()
    if options.listing:
        specs = plugins.studies.specs.values()
        echo_table(["study", "title"], [[s.name, s.title] for s in specs], prose=("title",))
        return EXIT_OK
    if options.name is None:
        raise UserError(
            "cmbench study",
            "names no study",
            allowed=", ".join(plugins.studies.specs) or "a .toml file",
            remedy="see `cmbench study --list`",
        )
    from cmbench.report.study_plot import require_matplotlib
    from cmbench.sweep.executors import Local
    from cmbench.sweep.studies import load_study, plan_study, run_study

    if not options.no_plot:
        require_matplotlib()
    found = load_study(plugins, options.name)
    with stop_asker(options.time_limit_s) as should_stop:
        context = make_context(options, plugins, should_stop)
        result = run_study(context, found, plan_study(context, found), Local())
    return show(result, options.output or context.workspace.root / "studies", not options.no_plot)


def show(result: StudyResult, folder: Path, plots: bool) -> int:
    """Print the table of a study, write its page into ``folder``; return the exit code."""
    from cmbench.report.study import mean_text, summary
    from cmbench.report.study_plot import draw

    rows = [
        [arm.arm.name, str(nfe), *(mean_text(arm.values(m, nfe)) for m in result.metrics)]
        for arm in result.arms
        for nfe in arm.nfes
    ]
    echo_table(["arm", "NFE", *result.metrics], rows)
    page = folder / f"{result.name}.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw(result, folder) if plots else []
        write_atomically(page, summary(result, pictures).encode())
    except OSError as error:
        raise UserError(
            "--output",
            f"{folder} cannot be written ({error.strerror})",
            remedy="choose another folder",
        ) from error
    click.echo(f"page: {page}")
    reasons = Counter(r.reason for a in result.arms for r in a.records if r.status == "failed")
    for reason, count in reasons.items():
        click.echo(f"error: {count} cell(s) failed: {reason}", err=True)
    return EXIT_CELLS_FAILED if reasons else EXIT_OK
