"""``cmbench parity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, MissingError, UserError


@click.command("parity")
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=None,
    help="The official code's outputs (.safetensors): compare with them.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=None,
    help="Write seeded inputs there, for the official code.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of the inputs.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    metavar="N",
    default=8,
    show_default=True,
    help="Number of inputs.",
)
@click.option(
    "--part",
    metavar="NAME",
    default="ema",
    show_default=True,
    help="Which network of a file with several.",
)
@click.option(
    "--preconditioning",
    type=click.Choice(["edm", "boundary"]),
    default=None,
    help="What the output means, where the file does not say.",
)
@click.option(
    "--sigma-min",
    type=click.FloatRange(0),
    metavar="X",
    default=None,
    help="Noise level of the boundary, where the file does not say.",
)
@click.option(
    "--channels-per-head",
    type=click.IntRange(1),
    metavar="N",
    default=None,
    help="Width of an attention head, where shapes cannot tell.",
)
@click.option(
    "--resolution",
    type=click.IntRange(1),
    metavar="PIXELS",
    default=None,
    help="Side of the images, where shapes cannot tell.",
)
@click.option("--float64", "double", is_flag=True, help="Compute in double precision.")
def parity(
    checkpoint: Path,
    reference: Path | None,
    inputs: Path | None,
    seed: int,
    count: int,
    double: bool,
    **options: Any,
) -> int:
    """Compare an original checkpoint, as read here, with the official code's outputs.

    docs/parity.md has the procedure and what to run in the official repositories.

    \b
    cmbench parity edm-cifar10-32x32-cond-vp.pkl --inputs inputs.safetensors
    cmbench parity edm-cifar10-32x32-cond-vp.pkl --reference outputs.safetensors
    """
    if (reference is None) == (inputs is None):
        raise UserError(
            "cmbench parity",
            "nothing to do" if inputs is None else "two things to do",
            allowed="--inputs or --reference",
            remedy="give one of them",
        )
    if not checkpoint.exists():
        raise MissingError(
            "cmbench parity",
            f"{checkpoint} does not exist",
            remedy="give the path of the checkpoint",
        )
    import torch

    from cmbench.cli.importing import with_told
    from cmbench.importers.parity import TOLERANCE, compare, read_reference, write_inputs
    from cmbench.importers.read import read_checkpoint

    found = read_checkpoint(
        checkpoint,
        part=options["part"],
        preconditioning=options["preconditioning"] or "",
        channels_per_head=options["channels_per_head"],
        resolution=options["resolution"],
    )
    found = with_told(found, None, options["sigma_min"])
    if inputs is not None:
        write_inputs(found, inputs, count, seed)
        click.echo(f"{inputs}: {count} inputs of seed {seed} for {found.network}")
        return EXIT_OK
    assert reference is not None
    tensors = read_reference(reference, found)
    agreements = compare(found, tensors, torch.float64 if double else torch.float32)
    for agreement in agreements:
        state = "agrees" if agreement.error <= TOLERANCE else "DIFFERS"
        click.echo(
            f"{agreement.output}: largest relative error {agreement.error:.2e} over "
            f"{agreement.images} images, at most {TOLERANCE:g}: {state}"
        )
    return EXIT_OK if all(a.error <= TOLERANCE for a in agreements) else EXIT_CELLS_FAILED
