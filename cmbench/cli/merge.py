"""``cmbench merge``."""

from __future__ import annotations

from pathlib import Path

import click

from cmbench.cli.options import workspace_option
from cmbench.cli.output import echo
from cmbench.cli.record_files import echo_hidden, echo_unreadable
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK
from cmbench.leaderboard.merge import merge
from cmbench.records.workspace import Workspace


@click.command("merge")
@click.argument(
    "sources", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path)
)
@workspace_option
def merge_(sources: tuple[Path, ...], workspace_dir: str | None) -> int:
    """Copy the records of other workspaces or record folders into this workspace.

    Equal records are kept once. A cell that was measured again with a result that agrees within the
    tolerance of `cmbench verify --full` is kept beside the first as a reproduction, which pages do
    not count and `cmbench show` names. Other finished records of one cell that differ are a
    conflict, and so are two different artifacts of one name: the error names them and nothing is
    written. Records that cannot be read are left out and listed, and the exit code is 1.
    """
    echo_hidden(path for source in sources for path in record_places(source))
    result = merge(sources, Workspace.choose(workspace_dir).all_records)
    for word, names in (
        ("added", result.added),
        ("replaced", result.replaced),
        ("reproduced", result.reproduced),
    ):
        for name in names:
            echo(f"{word}  {name}")
    again = f"{len(result.reproduced)} reproduced, " if result.reproduced else ""
    for reason in result.left_out:
        echo(f"not copied: {reason}", err=True)
    echo(
        f"{len(result.added)} added, {len(result.replaced)} replaced, {again}"
        f"{len(result.equal)} already there",
        err=True,
    )
    echo_unreadable(result.unreadable)
    return EXIT_CELLS_FAILED if result.unreadable else EXIT_OK


def record_places(source: Path) -> list[Path]:
    """Return the folders of a source in which records may lie."""
    return [source, *source.glob("*/"), *source.glob("records/*/")]
