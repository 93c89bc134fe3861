"""``cmbench import``."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click

from cmbench.cli.checkpoints import CheckpointOptions
from cmbench.cli.common import echo_table
from cmbench.cli.options import Number, WorkspaceOptions, argument, flag, option, takes
from cmbench.cli.output import echo
from cmbench.errors import MissingError, UserError
from cmbench.importers.public import PublicCheckpoint, find_public, obtain, public_checkpoints
from cmbench.records.workspace import Workspace

_NOT_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True, kw_only=True)
class ImportOptions(CheckpointOptions, WorkspaceOptions):
    """What the user asked of `cmbench import`."""

    checkpoint: Path | None = argument(
        type=click.Path(path_type=Path), metavar="FILE|NAME", required=False
    )
    to: str | None = option(
        "--to",
        "-O",
        metavar="NAME|PATH",
        help="Its name in the workspace, or a .safetensors file.  [default: the file's name]",
    )
    sigma_data: float | None = option(
        "--sigma-data",
        type=Number(0, min_open=True),
        metavar="X",
        help="Standard deviation of its data, if the file does not say.",
    )
    force: bool = flag("--force", help="Replace another checkpoint of that name.")
    listed: bool = flag("--list", help="Print the published checkpoints that have a NAME.")


@click.command("import")
@takes(ImportOptions)
def import_(options: ImportOptions) -> None:
    """Read a checkpoint of another project, without running any code in it.

    FILE is a .pkl of EDM, EDM2, ECT or TCM, a .pt of OpenAI's consistency models, a diffusers
    U-Net folder, OpenAI's JAX checkpoint_N, or .safetensors under official names. NAME is one that
    --list prints: the file is downloaded first.

    \b
    cmbench import edm-cifar10-uncond-vp
    cmbench import edm-cifar10-32x32-uncond-vp.pkl --to edm-cifar10
    cmbench import imagenet64.pt --parameterization boundary --sigma-min 0.002
    cmbench run --checkpoint edm-cifar10 --dataset cifar10 --nfe 17,35
    cmbench run --dataset cifar10 -o teacher=import:edm-cifar10
    """
    workspace = Workspace.choose(options.workspace_dir)
    if options.listed:
        print_public(workspace)
        return
    path = options.checkpoint
    if path is None:
        raise UserError(
            "cmbench import",
            "no checkpoint is named",
            allowed="FILE or NAME",
            remedy="see `cmbench import --help`, and --list for published checkpoints",
        )
    public = None if path.exists() else find_public(str(path))
    if public is not None:
        path = obtain(public, workspace.downloads, DownloadLines(public.name))
        options = with_what_is_known(options, public)
    elif not path.exists():
        raise MissingError(
            "cmbench import",
            f"{path} does not exist",
            allowed="a file, or a name that `cmbench import --list` prints",
            remedy="give the path of the checkpoint",
        )
    import_file(path, options, workspace, public)


def import_file(
    path: Path, options: ImportOptions, workspace: Workspace, public: PublicCheckpoint | None
) -> None:
    """Read a file, write what it becomes, and print what it is and what to do with it."""
    from cmbench.cli.checkpoints_work import describe, keep, read
    from cmbench.sweep.imported import path_of

    target = path_of(workspace, options.to or default_name(path))
    found = read(path, options, options.sigma_data)
    if public is not None:
        found = found.model_copy(update={"source": {**found.source, "url": public.url}})
    inside = target.parent == workspace.imported
    sha256 = keep(found, target, force=options.force, ours=inside)
    for line in describe(found):
        echo(line)
    for line in published_facts(public) if public is not None else ():
        echo(line)
    name = target.stem if inside else str(target)
    echo(f"written          {target} (sha256 {sha256[:16]})")
    dataset = public.dataset if public is not None else "DATASET"
    if found.parameterization:
        echo(f"sample it with   cmbench run --checkpoint {name} --dataset {dataset}")
    if found.parameterization == "edm":
        echo(f"start from it    cmbench run --method METHOD -o teacher=import:{name}")


def with_what_is_known(options: ImportOptions, public: PublicCheckpoint) -> ImportOptions:
    """Return the options with what a published file does not say itself, unless they say it."""
    said = {k: v for k, v in public.given.items() if getattr(options, k) is None}
    return replace(options, to=options.to or public.name, **said)


def published_facts(public: PublicCheckpoint) -> list[str]:
    """Return what the list knows of a checkpoint, as lines of text."""
    facts = {
        "published": ", ".join(filter(None, (public.published, public.note))),
        "kind of file": public.format if public.format != public.kind else "",
        "licence": public.licence or "not known: see its authors' page",
        "address": public.url,
    }
    return [f"{name:<16} {value}" for name, value in facts.items() if value]


def print_public(workspace: Workspace) -> None:
    """Print the published checkpoints and which of them are here."""
    rows = []
    for one in public_checkpoints():
        state = "" if one.is_read else f"not read here ({one.kind})"
        if one.is_read and one.by_hand:
            state = "fetch by hand"
        if one.path(workspace.downloads).is_file():
            state = "downloaded"
        if (workspace.imported / f"{one.name}.json").is_file():
            state = "imported"
        facts = (one.method, one.dataset, one.conditioning, one.published, one.licence)
        rows.append([one.name, *facts, state])
    echo_table(
        ["name", "method", "dataset", "classes", "published", "licence", "state"],
        rows,
        title="published checkpoints",
    )


class DownloadLines:
    """Prints how much of a file has arrived, every few seconds, on stderr."""

    def __init__(self, name: str, every_s: float = 5.0) -> None:
        self.name, self.every_s, self.due = name, every_s, 0.0

    def __call__(self, done: int, total: int | None) -> None:
        """Print a line if it is time, or if the file is complete."""
        now = time.monotonic()
        if now < self.due and done != total:
            return
        self.due = now + self.every_s
        of = f" of {total / 1e6:,.1f} MB ({done / max(total, 1):.0%})" if total else " MB"
        echo(f"downloading {self.name}: {done / 1e6:,.1f}{of}", err=True)


def default_name(path: Path) -> str:
    """Return the name of a checkpoint as it may stand in file names and run ids."""
    stem = path.resolve().name if path.is_dir() else path.stem
    return _NOT_A_NAME.sub("-", stem).strip("-._+")[:40] or "imported"
