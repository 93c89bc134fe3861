"""``cmbench study``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.common import echo_table
from cmbench.cli.options import LongOptions, argument, flag, option, takes
from cmbench.errors import EXIT_OK, UserError
from cmbench.plugin.manager import load_plugins


@dataclass(frozen=True, kw_only=True)
class StudyOptions(LongOptions):
    """What the user asked of `cmbench study`."""

    name: str | None = argument(required=False)
    listing: bool = flag("--list", help="List the studies.")
    output: Path | None = option(
        "--out",
        "-O",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Folder of the page and its plots.  [default: WORKSPACE/studies]",
    )
    no_plot: bool = flag("--no-plot", help="Write tables only; needs no matplotlib.")


@click.command("study")
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
            "no study is named",
            allowed=", ".join(plugins.studies.specs) or "a .toml file",
            remedy="see `cmbench study --list`",
        )
    if not options.name.endswith(".toml"):
        plugins.studies.get(options.name, "cmbench study")
    from cmbench.cli.study_work import carry_out  # imports torch

    return carry_out(options, options.name, plugins)
