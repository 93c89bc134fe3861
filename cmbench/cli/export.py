"""``cmbench export``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from cmbench.cli.options import workspace_option
from cmbench.cli.output import echo
from cmbench.cli.record_files import echo_unreadable, record_folders
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.files import write_atomically
from cmbench.leaderboard.export import FlatTable, cell_table, row_table, to_csv, to_parquet
from cmbench.records.workspace import Workspace
from cmbench.report.latex import latex_tables

FORMATS = ("csv", "parquet", "latex", "json")


@click.command()
@click.argument("form", metavar="csv|parquet|latex|json", type=click.Choice(FORMATS))
@click.option(
    "--dataset",
    "-d",
    "datasets",
    metavar="D",
    multiple=True,
    help="Only this dataset; may be repeated.  [default: all with records]",
)
@click.option("--cells", is_flag=True, help="One line per record instead of per row over seeds.")
@click.option(
    "--out",
    "-O",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: stdout, except parquet]",
)
@workspace_option
def export(
    form: str, datasets: tuple[str, ...], cells: bool, out: Path | None, workspace_dir: str | None
) -> int:
    """Export rows (mean, interval and raw values over seeds) or cells.

    Exits 1 if a record could not be read; the others are exported.
    """
    if form == "latex" and cells:
        raise UserError("export", "latex has rows only, not --cells", allowed="csv, parquet, json")
    if form == "parquet" and out is None:
        raise UserError("export", "parquet needs a file", remedy="give --out FILE")
    folders = record_folders(Workspace.existing(workspace_dir), datasets)
    if form == "latex":
        text, errors = latex_tables(folders)
        data = text.encode()
    else:
        table = cell_table(folders) if cells else row_table(folders)
        data, errors = encode(table, form), table.errors
    if out is None:
        sys.stdout.write(data.decode())
    else:
        write_atomically(out, data)
        echo(str(out))
    echo_unreadable(errors)
    return EXIT_CELLS_FAILED if errors else EXIT_OK


def encode(table: FlatTable, form: str) -> bytes:
    """Return a table in one of the formats."""
    if form == "csv":
        return to_csv(table)
    if form == "parquet":
        return to_parquet(table)
    return (json.dumps(table.rows, indent=1, allow_nan=False) + "\n").encode()
