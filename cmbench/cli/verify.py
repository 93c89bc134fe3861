"""``cmbench verify``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from cmbench.cli.main import workspace_option
from cmbench.cli.show import find_record
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK
from cmbench.leaderboard.submit import unpack
from cmbench.leaderboard.verify import DEFAULT_TOLERANCE, Check, Resample, verify_record
from cmbench.records.workspace import Workspace

DEFAULT_SAMPLES = 5000


@click.command()
@click.argument("records", nargs=-1, required=True, metavar="RECORD...")
@click.option(
    "--samples",
    metavar="N",
    type=click.IntRange(min=0),
    default=DEFAULT_SAMPLES,
    show_default=True,
    help="Images to make again; 0 means all.",
)
@click.option(
    "--tolerance",
    metavar="SHARE",
    type=click.FloatRange(min=0),
    default=DEFAULT_TOLERANCE,
    show_default=True,
    help="Relative difference allowed where all images are made again.",
)
@click.option("--no-resample", is_flag=True, help="Check hashes only.")
@click.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"
)
@workspace_option
def verify(
    records: tuple[str, ...],
    samples: int,
    tolerance: float,
    no_resample: bool,
    device: str,
    workspace: str | None,
) -> int:
    """Check records: hashes, then make the first images again and measure them again.

    RECORD is a record file, a cell, or an archive of `cmbench submit`. Says of every part whether
    it is right, wrong, or could not be checked and why. Exits 1 if anything is wrong.
    """
    place = Workspace.existing(workspace)
    resample = None if no_resample else make_resample(place, device)
    failed = 0
    with ExitStack() as stack:
        for name in records:
            for path in find(place, name, stack):
                checks = verify_record(
                    path,
                    runs=place.root / "runs",
                    resample=resample,
                    samples=samples,
                    tolerance=tolerance,
                )
                failed += show(path, checks)
    return EXIT_CELLS_FAILED if failed else EXIT_OK


def find(place: Workspace, name: str, stack: ExitStack) -> Iterator[Path]:
    """Yield the record files that ``name`` means; archives are extracted to a temporary folder."""
    if Path(name).is_file() and (zipfile.is_zipfile(name) or _was_zip(Path(name))):
        folder = stack.enter_context(TemporaryDirectory(prefix="cmbench-verify-"))
        yield from unpack(Path(name), Path(folder))
    elif Path(name).is_file():
        yield Path(name)
    else:
        yield find_record(place, name, "cmbench verify")


def _was_zip(path: Path) -> bool:
    """Say whether a file begins or is named like an archive, so that damage is called that."""
    with path.open("rb") as file:
        return path.suffix == ".zip" or file.read(4) == b"PK\x03\x04"


def make_resample(place: Workspace, device: str) -> Resample:
    """Return what makes images again, in the context of ``cmbench run``."""
    from cmbench.cli.resampling import resampler  # imports torch
    from cmbench.cli.run import make_context

    return resampler(make_context({"workspace": str(place.root), "device": device, "quiet": True}))


def show(path: Path, checks: list[Check]) -> int:
    """Print the checks of one record; return how many failed."""
    click.echo(path.stem)
    for check in checks:
        click.echo(f"  {check.state:<12} {check.name}: {check.detail}")
    return sum(check.state == "failed" for check in checks)
