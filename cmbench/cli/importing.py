"""``cmbench import``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.checkpoints import CheckpointOptions
from cmbench.cli.options import WorkspaceOptions, flag, option, takes

_NOT_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True, kw_only=True)
class ImportOptions(CheckpointOptions, WorkspaceOptions):
    """What the user asked of `cmbench import`."""

    to: str | None = option(
        "--to",
        "-o",
        metavar="NAME|PATH",
        help="Its name in the workspace, or a .safetensors file.  [default: the file's name]",
    )
    sigma_data: float | None = option(
        "--sigma-data",
        type=click.FloatRange(0, min_open=True),
        metavar="X",
        help="Standard deviation of its data, if the file does not say.",
    )
    force: bool = flag("--force", help="Replace another checkpoint of that name.")


@click.command("import")
@takes(ImportOptions)
def import_(options: ImportOptions) -> None:
    """Read a checkpoint of another project, without running any code in it.

    FILE is a .pkl of EDM, EDM2, ECT or TCM, a .pt of OpenAI's consistency models, a diffusers
    U-Net folder, OpenAI's JAX checkpoint_N, or .safetensors under official names.

    \b
    cmbench import edm-cifar10-32x32-uncond-vp.pkl --to edm-cifar10
    cmbench import imagenet64.pt --parameterization boundary --sigma-min 0.002
    cmbench run --checkpoint edm-cifar10 --dataset cifar10 --nfe 17,35
    cmbench run --dataset cifar10 -o teacher=import:edm-cifar10
    """
    from cmbench.cli.checkpoints_work import describe, keep, read
    from cmbench.records.workspace import Workspace
    from cmbench.sweep.imported import path_of

    workspace = Workspace.choose(options.workspace_dir)
    target = path_of(workspace, options.to or default_name(options.checkpoint))
    found = read(options, options.sigma_data)
    for line in describe(found):
        click.echo(line)
    inside = target.parent == workspace.imported
    sha256 = keep(found, target, force=options.force, ours=inside)
    name = target.stem if inside else str(target)
    click.echo(f"written          {target} (sha256 {sha256[:16]})")
    if found.parameterization:
        click.echo(f"sample it with   cmbench run --checkpoint {name} --dataset DATASET")
    if found.parameterization == "edm":
        click.echo(f"start from it    cmbench run --method METHOD -o teacher=import:{name}")


def default_name(path: Path) -> str:
    """Return the name of a checkpoint as it may stand in file names and run ids."""
    stem = path.resolve().name if path.is_dir() else path.stem
    return _NOT_A_NAME.sub("-", stem).strip("-._+")[:40] or "imported"
