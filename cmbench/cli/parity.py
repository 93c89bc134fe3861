"""``cmbench parity``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.checkpoints import CheckpointOptions
from cmbench.cli.options import argument, flag, option, takes
from cmbench.cli.output import echo
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, MissingError, UserError


@dataclass(frozen=True, kw_only=True)
class ParityOptions(CheckpointOptions):
    """What the user asked of `cmbench parity`."""

    checkpoint: Path = argument(type=click.Path(path_type=Path), metavar="FILE")
    reference: Path | None = option(
        "--reference",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The official code's outputs (.safetensors) to compare with.",
    )
    inputs: Path | None = option(
        "--inputs",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write seeded inputs for the official code to this file.",
    )
    seed: int = option(
        "--seed", type=click.IntRange(0), metavar="N", default=0, help="Seed of the inputs."
    )
    count: int = option(
        "--count", type=click.IntRange(1), metavar="N", default=8, help="Number of inputs."
    )
    double: bool = flag("--float64", help="Compute in double precision.")


@click.command("parity")
@takes(ParityOptions)
def parity(options: ParityOptions) -> int:
    """Compare a checkpoint, as read here, with the outputs of the official code.

    docs/parity.md has the procedure and what to run in the official repositories.

    \b
    cmbench parity edm-cifar10-32x32-cond-vp.pkl --inputs inputs.safetensors
    cmbench parity edm-cifar10-32x32-cond-vp.pkl --reference outputs.safetensors
    """
    require_one_task(options)
    import torch

    from cmbench.cli.checkpoints_work import read
    from cmbench.importers.parity import TOLERANCE, compare, read_reference, write_inputs

    found = read(options.checkpoint, options)
    if options.inputs is not None:
        write_inputs(found, options.inputs, options.count, options.seed)
        given = f"{options.count} inputs of seed {options.seed}"
        echo(f"{options.inputs}: {given} for {found.architecture}")
        return EXIT_OK
    assert options.reference is not None
    tensors = read_reference(options.reference, found)
    agreements = compare(found, tensors, torch.float64 if options.double else torch.float32)
    for agreement in agreements:
        state = "agrees" if agreement.error <= TOLERANCE else "DIFFERS"
        echo(
            f"{agreement.output}: largest relative error {agreement.error:.2e} over "
            f"{agreement.images} images, at most {TOLERANCE:g}: {state}"
        )
    return EXIT_OK if all(a.error <= TOLERANCE for a in agreements) else EXIT_CELLS_FAILED


def require_one_task(options: ParityOptions) -> None:
    """Raise ``UserError`` unless the checkpoint exists and one task is given."""
    if (options.reference is None) == (options.inputs is None):
        raise UserError(
            "cmbench parity",
            "neither option given" if options.inputs is None else "both options given",
            allowed="--inputs or --reference",
            remedy="give one of them",
        )
    if not options.checkpoint.exists():
        raise MissingError(
            "cmbench parity",
            f"{options.checkpoint} does not exist",
            remedy="give the path of the checkpoint",
        )
