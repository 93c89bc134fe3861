"""``cmbench clean``."""

from __future__ import annotations

import json

import click

from cmbench.cli.options import json_option, workspace_option
from cmbench.cli.output import echo, echo_line
from cmbench.records.leftovers import leftovers
from cmbench.records.workspace import Workspace


@click.command()
@click.option("--yes", is_flag=True, help="Delete what is listed.")
@json_option
@workspace_option
def clean(yes: bool, as_json: bool, workspace_dir: str | None) -> None:
    """List what the workspace could do without; delete it with --yes.

    Temporary files of processes that were killed, checkpoints of finished runs but for the last
    one, and runs that no record names, finished or not. Runs that are being trained stay.
    """
    workspace = Workspace.existing(workspace_dir)
    found = leftovers(workspace)
    if yes:
        for item in found:
            item.remove()
    if as_json:
        rows = [{"path": str(i.path), "reason": i.reason, "bytes": i.bytes} for i in found]
        echo(json.dumps({"deleted": yes, "leftovers": rows}, indent=1))
        return
    for item in found:
        echo_line(f"{item.bytes / 2**20:9.1f} MiB  {item.path}  {item.reason}")
    total = sum(item.bytes for item in found) / 2**20
    if not found:
        echo(f"nothing to clean in {workspace.root}")
    elif yes:
        echo(f"deleted {len(found)} item(s), {total:.1f} MiB")
    else:
        echo(f"{len(found)} item(s), {total:.1f} MiB; `cmbench clean --yes` deletes them")
