"""``cmbench verify``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from cmbench.cli.common import make_context
from cmbench.cli.options import ComputeOptions, DeviceOptions, Number, argument, flag, option, takes
from cmbench.cli.output import echo
from cmbench.cli.record_files import find_record
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.files import regular
from cmbench.leaderboard.merge import find_records
from cmbench.leaderboard.sampled_again import DEFAULT_TOLERANCE, Check
from cmbench.leaderboard.submit import unpack
from cmbench.leaderboard.verify import verify_record
from cmbench.records.reproduction import Reproduce
from cmbench.records.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(DeviceOptions):
    """What the user asked of `cmbench verify`."""

    records: tuple[str, ...] = argument(nargs=-1, required=True, metavar="RECORD...")
    full: bool = flag("--full", help="Sample all images again and compare every metric; slow.")
    tolerance: float | None = option(
        "--tolerance",
        metavar="SHARE",
        type=Number(min=0, max=1),
        help="Relative difference allowed for metrics, with --full.  "
        f"[default: {DEFAULT_TOLERANCE:g}]",
    )
    no_resample: bool = flag("--no-resample", help="Check hashes only.")


@click.command()
@takes(VerifyOptions)
def verify(options: VerifyOptions) -> int:
    """Check records: hashes, then sample the first images again and compare them.

    RECORD is a record file, a cell, a workspace or a folder of records (all that are in it), or an
    archive of `cmbench submit`. Every part is reported as
    ok (the same bits), reproduced (within the tolerance that the record states, on other hardware
    or another torch), failed, or not checked and why. Exits 1 if a part failed.
    """
    for name, given, needed in (
        ("--tolerance", options.tolerance is not None, options.full),
        ("--full", options.full, not options.no_resample),
    ):
        if given and not needed:
            raise UserError(
                name,
                "compares images that are sampled again, which these options do not do",
                allowed="--full, --full --tolerance SHARE, or --no-resample alone",
                remedy=f"leave {name} out, or change the other options",
            )
    workspace = Workspace.existing(options.workspace_dir)
    reproduce = None if options.no_resample else make_reproducer(options)
    failed = 0
    with ExitStack() as stack:
        for name in options.records:
            for path in find(workspace, name, stack):
                checks = verify_record(
                    path,
                    runs=workspace.root / "runs",
                    reproduce=reproduce,
                    full=options.full,
                    tolerance=DEFAULT_TOLERANCE if options.tolerance is None else options.tolerance,
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
    elif Path(name).is_dir():
        yield from find_records(Path(name), "cmbench verify")
    else:
        yield find_record(workspace, name, "cmbench verify")


def _was_zip(path: Path) -> bool:
    """Say whether a file begins or is named like an archive, so that damage is called that."""
    with regular(path).open("rb") as file:
        return path.suffix == ".zip" or file.read(4) == b"PK\x03\x04"


def make_reproducer(options: VerifyOptions) -> Reproduce:
    """Return what samples images again, in the context of ``cmbench run``."""
    from cmbench.sweep.reproducing import reproducer  # imports torch

    quiet = ComputeOptions(workspace_dir=options.workspace_dir, device=options.device, quiet=True)
    return reproducer(make_context(quiet))


def show(path: Path, checks: list[Check]) -> int:
    """Print the checks of one record; return how many failed."""
    echo(path.stem)
    for check in checks:
        echo(f"  {check.state:<12} {check.name}: {check.detail}")
    return sum(check.state == "failed" for check in checks)
