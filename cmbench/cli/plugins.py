"""``cmbench plugins``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from cmbench.cli.options import json_option
from cmbench.cli.output import echo
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK
from cmbench.plugin.manager import load_plugins


@click.command()
@json_option
def plugins(as_json: bool) -> int:
    """List plugins: name, distribution, version, status, error; exit 1 if one failed."""
    found = load_plugins().plugins
    code = EXIT_CELLS_FAILED if any(info.status != "ok" for info in found) else EXIT_OK
    if as_json:
        echo(json.dumps([asdict(info) for info in found], indent=1))
        return code
    for info in found:
        line = f"{info.name:<24} {info.distribution} {info.version}  {info.status}"
        said = info.error or info.warning
        echo(line + (f"  {said}" if said else f"  ({len(info.hooks)} hooks)"))
    return code
