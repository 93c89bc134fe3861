"""``cmbench verify``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from cmbench.cli.common import ContextOptions, device_option, make_context, workspace_option
from cmbench.cli.record_files import find_record
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK
from cmbench.leaderboard.submit import unpack
from cmbench.leaderboard.verify import DEFAULT_TOLERANCE, Check, verify_record
from cmbench.records.reproduction import Reproduce
from cmbench.records.workspace import Workspace


@click.command()
@click.argument("records", nargs=-1, required=True, metavar="RECORD...")
@click.option(
    "--full", is_flag=True, help="Sample all images again and compare every metric; slow."
)
@click.option(
    "--tolerance",
    metavar="SHARE",
    type=click.FloatRange(min=0),
    default=DEFAULT_TOLERANCE,
    show_default=True,
    help="Relative difference allowed for metrics, with --full.",
)
@click.option("--no-resample", is_flag=True, help="Check hashes only.")
@device_option
@workspace_option
def verify(
    records: tuple[str, ...],
    full: bool,
    tolerance: float,
    no_resample: bool,
    device: str,
    workspace_dir: str | None,
) -> int:
    """Check records: hashes, then sample the first images again and compare them.

    RECORD is a record file, a cell, or an archive of `cmbench submit`. Every part is reported as
    ok (the same bits), reproduced (within the tolerance that the record states, on other hardware
    or another torch), failed, or not checked and why. Exits 1 if a part failed.
    """
    workspace = Workspace.existing(workspace_dir)
    reproduce = None if no_resample else make_reproducer(workspace, device)
    failed = 0
    with ExitStack() as stack:
        for name in records:
            for path in find(workspace, name, stack):
                checks = verify_record(
                    path,
                    runs=workspace.root / "runs",
                    reproduce=reproduce,
                    full=full,
                    tolerance=tolerance,
                )
                failed += show(path, checks)
    return EXIT_CELLS_FAILED if failed else EXIT_OK


def find(workspace: Workspace, name: str, stack: ExitStack) -> Iterator[Path]:
    """Yield the record files that ``name`` means; archives are extracted to a temporary folder."""
    if Path(name).is_file() and (zipfile.is_zipfile(name) or _was_zip(Path(name))):
        folder = stack.enter_context(TemporaryDirectory(prefix="cmbench-verify-"))
        yield from unpack(Path(name), Path(folder))
    elif Path(name).is_file():
        yield Path(name)
    else:
        yield find_record(workspace, name, "cmbench verify")


def _was_zip(path: Path) -> bool:
    """Say whether a file begins or is named like an archive, so that damage is called that."""
    with path.open("rb") as file:
        return path.suffix == ".zip" or file.read(4) == b"PK\x03\x04"


def make_reproducer(workspace: Workspace, device: str) -> Reproduce:
    """Return what samples images again, in the context of ``cmbench run``."""
    from cmbench.sweep.reproducing import reproducer  # imports torch

    options = ContextOptions(workspace_dir=str(workspace.root), device=device, quiet=True)
    return reproducer(make_context(options))


def show(path: Path, checks: list[Check]) -> int:
    """Print the checks of one record; return how many failed."""
    click.echo(path.stem)
    for check in checks:
        click.echo(f"  {check.state:<12} {check.name}: {check.detail}")
    return sum(check.state == "failed" for check in checks)
