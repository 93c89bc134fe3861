"""``cmbench submit``."""

from __future__ import annotations

from pathlib import Path

import click

from cmbench.cli.options import workspace_option
from cmbench.cli.output import echo
from cmbench.cli.record_files import find_record
from cmbench.errors import EXIT_OK
from cmbench.leaderboard.submit import pack
from cmbench.records.workspace import Workspace


@click.command()
@click.argument("cells", nargs=-1, required=True, metavar="CELL...")
@click.option(
    "--out",
    "-O",
    metavar="FILE",
    default=Path("submission.zip"),
    type=click.Path(path_type=Path, dir_okay=False),
    help="Archive to write.",
)
@workspace_option
def submit(cells: tuple[str, ...], out: Path, workspace_dir: str | None) -> int:
    """Pack records with recipes, environments and checkpoint hashes into one archive.

    CELL is a record file, a cell or the start of one. `cmbench verify` accepts the archive. The
    archive has the hash of the weights, not the weights.
    """
    workspace = Workspace.existing(workspace_dir)
    manifest = pack([find_record(workspace, cell, "cmbench submit") for cell in cells], out)
    for entry in manifest.entries:
        echo(entry.record, err=True)
    echo(str(out))
    return EXIT_OK
