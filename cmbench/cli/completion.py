"""``cmbench completion``: shell completion by click's own mechanism."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from cmbench.cli.output import echo


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash: eval "$(cmbench completion bash)"
    zsh:  eval "$(cmbench completion zsh)"
    fish: cmbench completion fish | source
    """
    from cmbench.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    echo(kind(cli, {}, "cmbench", "_CMBENCH_COMPLETE").source())
