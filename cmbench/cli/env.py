"""``cmbench env``."""

from __future__ import annotations

import json

import click

from cmbench.cli.options import json_option, workspace_option
from cmbench.cli.output import echo
from cmbench.data.locations import DataLocations
from cmbench.records.provenance import environment
from cmbench.records.workspace import Workspace
from cmbench.sweep.threads import choose_threads


@click.command()
@json_option
@workspace_option
def env(as_json: bool, workspace_dir: str | None) -> None:
    """Show versions, hardware, threads and paths."""
    import torch  # for the name of the GPU

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = environment(choose_threads(), gpu).model_dump(mode="json")
    found["workspace"] = str(Workspace.choose(workspace_dir).root.resolve())
    found["data"] = str(DataLocations().data_dir)
    if as_json:
        echo(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        echo(f"{key:<12} {value if value is not None else 'none'}")
