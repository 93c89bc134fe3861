"""``cmbench sample``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.common import parse_numbers, parse_sigmas
from cmbench.cli.options import ComputeOptions, Parsed, WholeNumber, argument, flag, option, takes
from cmbench.cli.run import parse_precision
from cmbench.errors import EXIT_OK, UserError
from cmbench.plugin.specs import MAX_BATCH

#: All images of one NFE are held in memory.
MAX_IMAGES = 1_000_000
#: What a folder of images is not called.
_FILES = {".zip", ".tar", ".gz", ".npy", ".png", ".jpg", ".jpeg", ".pt", ".safetensors"}


def parse_labels(text: str, option: str) -> tuple[int, ...]:
    """Return ``0,1,2`` as classes; raise ``UserError`` for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(option, f"{text!r}", allowed="classes, for example 0,1,2") from None


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ComputeOptions):
    """What the user asked of `cmbench sample`."""

    run: str = argument(metavar="RUN")
    count: int = option(
        "--count",
        "-n",
        metavar="N",
        type=WholeNumber(min=1, max=MAX_IMAGES),
        default=64,
        help="Images per NFE.",
    )
    nfes: tuple[int, ...] | None = option(
        "--nfe",
        metavar="N[,N…]",
        type=Parsed(parse_numbers),
        help="Network evaluations per image.  [default: the fewest of the dataset's sweep]",
    )
    out: Path | None = option(
        "--out",
        "-O",
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="Folder of PNG files, or an .npz file (arr_0 uint8 [N, H, W, C], labels in arr_1).",
    )
    grid: Path | None = option(
        "--grid",
        metavar="FILE.png",
        type=click.Path(path_type=Path),
        help="One picture of all images; of several NFE each has its own, FILE-nfe2.png.",
    )
    dataset: str | None = option(
        "--dataset", "-d", metavar="D", help="Dataset of an imported checkpoint."
    )
    seed: int = option(
        "--seed", metavar="N", type=WholeNumber(min=0), default=0, help="Of noise and classes."
    )
    labels: tuple[int, ...] | None = option(
        "--labels",
        metavar="C[,C…]",
        type=Parsed(parse_labels),
        help="Classes, repeated in turn.  [default: drawn by the dataset's frequencies]",
    )
    sigmas: tuple[float, ...] | str | None = option(
        "--sigmas", metavar="S[,S…]", type=Parsed(parse_sigmas), help="Descending noise levels."
    )
    sampler: str | None = option(
        "--sampler", metavar="NAME", help="Solver, for methods that have more than one."
    )
    ema: str | None = option(
        "--ema", metavar="LABEL", help="Which average of the weights to sample."
    )
    precision: str = option(
        "--precision",
        metavar="P",
        default="fp32",
        type=Parsed(parse_precision),
        help="Sample in fp32, or by autocast in bf16 or fp16.",
    )
    batch_size: int = option(
        "--batch-size",
        metavar="N",
        type=WholeNumber(min=1, max=MAX_BATCH),
        default=500,
        help="Images per batch.",
    )
    force: bool = flag("--force", help="Replace the images that --out and --grid name.")


@click.command()
@takes(SampleOptions)
def sample(options: SampleOptions) -> int:
    """Make images of RUN: a run's id or folder, or import:NAME with --dataset. Measures nothing.

    \b
    cmbench sample digits/METHOD-RECIPE-s0-HASH -n 64 --nfe 1,2 --grid grid.png
    cmbench sample import:NAME -d cifar10 -n 50000 --nfe 1 --out samples.npz
    """
    if options.out is None and options.grid is None:
        raise UserError(
            "cmbench sample",
            "the images would go nowhere",
            allowed="--out FOLDER, --out FILE.npz or --grid FILE.png",
            remedy="add one of them",
        )
    require_names(options)
    if isinstance(options.sigmas, str):
        raise UserError(
            "--sigmas",
            f"{options.sigmas!r}",
            allowed="descending noise levels, for example 80,0.8",
            remedy="`cmbench run --sigmas tuned` samples at tuned levels",
        )
    from cmbench.cli.sample_work import carry_out  # imports torch

    carry_out(options)
    return EXIT_OK


def require_names(options: SampleOptions) -> None:
    """Raise ``UserError`` for outputs whose names mean another kind of file."""
    if options.grid is not None and options.grid.suffix.lower() != ".png":
        raise UserError("--grid", f"{str(options.grid)!r}", allowed="FILE.png")
    if options.out is not None and options.out.suffix.lower() in _FILES:
        raise UserError("--out", f"{str(options.out)!r}", allowed="a folder, or FILE.npz")
