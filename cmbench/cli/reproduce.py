"""``cmbench reproduce``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.common import echo_table
from cmbench.cli.options import ComputeOptions, WholeNumber, argument, flag, option, takes
from cmbench.errors import UserError
from cmbench.importers.public import PublicCheckpoint, find_public, public_checkpoints
from cmbench.plugin.specs import MAX_BATCH


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(ComputeOptions):
    """What the user asked of `cmbench reproduce`."""

    name: str | None = argument(metavar="NAME", required=False)
    file: Path | None = option(
        "--file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The checkpoint, or the archive of samples.  [default: downloaded]",
    )
    reference: str | None = option(
        "--reference",
        metavar="REF",
        help="Reference statistics or images.  [default: the published ones, downloaded]",
    )
    weights: Path | None = option(
        "--weights",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="File of the extractor's weights.  [default: where `cmbench prepare` put it]",
    )
    trust_weights: bool = flag(
        "--trust-weights", help="Run a TorchScript file whose hash is not the pinned one."
    )
    samples: int | None = option(
        "--samples",
        type=WholeNumber(min=2),
        metavar="N",
        help="Score fewer images than were published.",
    )
    seed: int = option(
        "--seed", type=WholeNumber(min=0), metavar="N", default=0, help="Seed of sampling."
    )
    batch_size: int = option(
        "--batch-size",
        type=WholeNumber(min=1, max=MAX_BATCH),
        metavar="N",
        default=250,
        help="Images per batch; results do not depend on it.",
    )
    listed: bool = flag("--list", help="Print what can be reproduced.")


@click.command()
@takes(ReproduceOptions)
def reproduce(options: ReproduceOptions) -> int:
    """Measure a published value again under its published settings.

    NAME is one that --list prints. Its file and reference statistics are downloaded, its sampler,
    NFE, sample count, extractor and reference are those of the publication. The record says
    whether the value was reproduced; nothing is claimed for other files, other weights or fewer
    samples. Exit code 1 if the value was not reproduced.

    \b
    cmbench reproduce --list
    cmbench reproduce edm-cifar10-uncond-vp
    cmbench reproduce adm-imagenet256-guided-upsampled
    cmbench reproduce edm2-img64-s-fid --file FILE.pkl --samples 1000
    """
    if options.listed:
        print_reproducible()
        return 0
    row = find_reproducible(options.name)
    from cmbench.cli.reproduce_work import carry_out  # imports torch

    return carry_out(options, row)


def find_reproducible(name: str | None) -> PublicCheckpoint:
    """Return the row of that name; raise ``UserError`` if nothing of it can be measured here."""
    remedy = "choose one that `cmbench reproduce --list` prints"
    found = find_public(name) if name else None
    if found is None:
        problem = f"{name!r} is not listed" if name else "names nothing to reproduce"
        raise UserError("cmbench reproduce", problem, remedy=remedy)
    if why := why_not(found):
        raise UserError(f"cmbench reproduce {name}", why, remedy=remedy)
    return found


def why_not(row: PublicCheckpoint) -> str:
    """Return why a row cannot be reproduced here; empty if it can."""
    if not row.published:
        return "no value of it is published in the list"
    if row.note.startswith("guide "):
        return "its value needs guidance by a second network, which is not sampled here"
    return "" if row.metrics else "its settings are not in the list"


def print_reproducible() -> None:
    """Print the rows that can be reproduced, with their settings."""
    rows = [
        [
            one.name,
            one.published,
            one.metrics.replace(" ", ", "),
            one.nfe or "-",
            one.sampler or "-",
            one.samples,
            one.reference,
            "settings UNVERIFIED" if "UNVERIFIED" in one.settings_in else one.note,
        ]
        for one in public_checkpoints()
        if not why_not(one)
    ]
    header = ["name", "published", "metrics", "nfe", "sampler", "samples", "reference", "note"]
    echo_table(header, rows, title="published values", prose=("metrics", "reference", "note"))
