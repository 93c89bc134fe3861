"""``cmbench study``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.common import ContextOptions, context_options, echo_table, takes, time_limit_option
from cmbench.errors import EXIT_OK, UserError
from cmbench.plugin.manager import load_plugins


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
    from cmbench.cli.study_work import carry_out  # imports torch

    return carry_out(options, options.name, plugins)
