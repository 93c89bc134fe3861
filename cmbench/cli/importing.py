"""``cmbench import``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.checkpoints import CheckpointOptions, checkpoint_options, read
from cmbench.cli.common import printable, takes, workspace_option
from cmbench.errors import UserError

if TYPE_CHECKING:
    from cmbench.importers.imported import ImportedNetwork

_NOT_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True, kw_only=True)
class ImportOptions(CheckpointOptions):
    """What the user asked of `cmbench import`."""

    to: str | None
    force: bool
    workspace_dir: str | None


@click.command("import")
@checkpoint_options
@click.option(
    "--to",
    "-o",
    "to",
    metavar="NAME|PATH",
    default=None,
    help="Its name in the workspace, or a .safetensors file.  [default: the file's name]",
)
@click.option(
    "--sigma-data",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    default=None,
    help="Standard deviation of its data, if the file does not say.",
)
@click.option("--force", is_flag=True, help="Replace another checkpoint of that name.")
@workspace_option
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
    from cmbench.records.workspace import Workspace
    from cmbench.sweep.imported import path_of

    workspace = Workspace.choose(options.workspace_dir)
    target = path_of(workspace, options.to or default_name(options.checkpoint))
    found = read(options)
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


def keep(found: ImportedNetwork, target: Path, *, force: bool, ours: bool) -> str:
    """Write weights and manifest and return the hash; never replace another checkpoint.

    ``ours``: the target is in the workspace, where weights without a manifest are left by an import
    that was stopped. Elsewhere they are a file of the user, perhaps the checkpoint itself.
    """
    from cmbench.training.checkpoint import load_checkpoint

    manifest = target.with_suffix(".json")
    if target.exists() and not (manifest.exists() or force or ours):
        raise UserError(
            "cmbench import",
            f"{target} already exists and was not imported",
            allowed="a new file",
            remedy="choose one with --to, or replace it with --force",
        )
    if manifest.exists() and not force:
        there = load_checkpoint(target, remedy="import it again with --force")
        if there.meta == json.loads(json.dumps({"imported": found.facts()})):
            return there.sha256
        raise UserError(
            "cmbench import",
            f"{target} is another checkpoint or has other facts about it",
            allowed="a new name",
            remedy="choose one with --to, or replace it with --force",
        )
    manifest.unlink(missing_ok=True)  # without it the old file does not count, if this stops now
    return found.save(target)


def describe(found: ImportedNetwork) -> list[str]:
    """Return what was recognised, as lines of text."""
    import torch

    from cmbench.importers.imported import build_network
    from cmbench.networks.base import num_parameters

    with torch.device("meta"):
        network = build_network(found.network, found.options, found.data_shape, found.num_classes)
    said = [str(found.description[key]) for key in ("class", "part") if key in found.description]
    options = ", ".join(f"{k} {_plain(v)}" for k, v in found.options.items())
    words = {"edm": "edm (a denoiser)", "boundary": "boundary (a consistency function)"}.get(
        found.parameterization, "unknown: give it with --parameterization before using the network"
    )
    constants = [
        f"{name} {value:g}"
        for name, value in (("sigma_data", found.sigma_data), ("sigma_min", found.sigma_min))
        if value is not None
    ]
    lines = [
        f"format           {found.format}" + (f" ({', '.join(said)})" if said else ""),
        f"network          {found.network}: {options}",
        f"parameters       {num_parameters(network):,}",
        f"images           {'x'.join(map(str, found.data_shape))}",
        f"classes          {found.num_classes or 'none (unconditional)'}",
        f"parameterization {', '.join([words, *constants])}",
    ]
    if found.assumed:
        assumed = ", ".join(f"{k} {_plain(v)}" for k, v in found.assumed.items())
        lines.append(f"assumed          {assumed} (not determined by the shapes)")
    return [printable(line) for line in lines]  # names come from the file


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
