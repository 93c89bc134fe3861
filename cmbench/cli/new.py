"""``cmbench new``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.options import argument, flag, option, takes
from cmbench.cli.output import echo
from cmbench.errors import UserError
from cmbench.plugin.manager import load_plugins
from cmbench.testing.scaffold import KINDS, Scaffold


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """What the user asked of `cmbench new`."""

    kind: str = argument(type=click.Choice(KINDS))
    name: str = argument(metavar="NAME")
    staged: bool = flag("--staged", help="A method with two phases of training.")
    teacher: bool = flag("--teacher", help="A method that learns from a teacher.")
    into: Path = option(
        "--into",
        metavar="DIR",
        type=click.Path(path_type=Path),
        default=Path(),
        help="Folder in which the folder NAME is made.",
    )


@click.command("new")
@takes(NewOptions)
def new(options: NewOptions) -> None:
    """Write a distribution with a method, dataset, metric or executor that passes its tests.

    \b
    cmbench new method my-method --teacher
    pip install -e ./my-method
    pytest my-method
    """
    scaffold = Scaffold(options.kind, options.name, options.staged, options.teacher)
    folder = options.into / options.name
    scaffold.require_free(load_plugins(), folder)
    try:
        for path in scaffold.write(folder):
            echo(path)
    except OSError as error:
        raise UserError(
            f"folder {folder}",
            f"cannot be written ({error.strerror})",
            remedy="choose a writable folder with --into",
        ) from error
    echo(f"next: pip install -e {folder}, then pytest {folder}", err=True)
