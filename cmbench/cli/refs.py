"""``cmbench refs``: reference statistics on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.common import echo_table
from cmbench.cli.options import (
    WorkspaceOptions,
    argument,
    json_option,
    option,
    takes,
    workspace_option,
)
from cmbench.cli.output import echo

if TYPE_CHECKING:
    from cmbench.metrics.reference import Reference
    from cmbench.metrics.reference_store import ReferenceStore


def open_store(workspace_dir: str | None) -> ReferenceStore:
    """Return the references of a workspace: imported ones, and computed ones from its cache."""
    from cmbench.metrics.reference_store import ReferenceStore
    from cmbench.records.workspace import Workspace

    workspace = Workspace.choose(workspace_dir)
    return ReferenceStore(workspace.root / "references", workspace.cache / "references")


@click.group()
def refs() -> None:
    """List, show, import and compare reference statistics."""


@refs.command("list")
@json_option
@workspace_option
def list_refs(as_json: bool, workspace_dir: str | None) -> None:
    """List the references of the workspace."""
    entries = list(open_store(workspace_dir).entries())
    if as_json:
        found = [
            {
                "name": entry.name,
                **(facts(entry.reference) if entry.reference else {}),
                "problem": entry.problem,
            }
            for entry in entries
        ]
        echo(json.dumps(found, indent=1))
        return
    rows = []
    for entry in entries:
        if entry.reference is None:
            rows.append([entry.name, "-", "-", "-", "-", "damaged"])
            echo(f"warning: {entry.problem}", err=True)
            continue
        known = facts(entry.reference)
        rows.append(
            [
                entry.name,
                known["extractor"],
                known["origin"],
                _count(known["count"]),
                _count(known["features"]),
                "ok",
            ]
        )
    echo_table(["name", "extractor", "origin", "images", "features of", "state"], rows)


@refs.command()
@click.argument("name")
@json_option
@workspace_option
def show(name: str, as_json: bool, workspace_dir: str | None) -> None:
    """Show the facts about the reference NAME (or about a file)."""
    known = facts(open_store(workspace_dir).get(name))
    if as_json:
        echo(json.dumps(known, indent=1))
        return
    for key, value in known.items():
        echo(f"{key:<16} {value}")


@dataclass(frozen=True, kw_only=True)
class ImportReferenceOptions(WorkspaceOptions):
    """What the user asked of `cmbench refs import`."""

    file: Path = argument(type=click.Path(path_type=Path))
    name: str | None = option(
        "--name", metavar="NAME", help="Name to import it as.  [default: FILE]"
    )
    extractor: str | None = option(
        "--extractor", metavar="NAME", help="Extractor of the statistics.  [default: by the format]"
    )
    count: int | None = option(
        "--count",
        type=click.IntRange(min=2),
        metavar="N",
        help="Number of images behind the statistics, if known.",
    )
    entry: str = option(
        "--entry", metavar="NAME", default="fid", help="Which statistics of an EDM2 file."
    )
    images: bool = option(
        "--images/--no-images",
        default=True,
        help="Extract the images in an OpenAI batch, for precision, recall and KID.",
    )
    weights: Path | None = option(
        "--weights",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="File of the extractor's weights for --images.  "
        "[default: where `cmbench prepare` put it]",
    )


@refs.command("import")
@takes(ImportReferenceOptions)
def import_(options: ImportReferenceOptions) -> None:
    """Import reference statistics of EDM, clean-fid, OpenAI, torch-fidelity or EDM2."""
    from cmbench.metrics.inception import InceptionExtractor
    from cmbench.metrics.reference_import import import_reference, with_reference_images
    from cmbench.samples.opening import open_samples

    reference = import_reference(
        options.file,
        name=options.name,
        extractor=options.extractor,
        count=options.count,
        entry=options.entry,
    )
    if options.images and reference.key.origin == "openai":
        images = (batch.images for batch in open_samples(str(options.file)).batches(250))
        extractor = InceptionExtractor(options.weights)
        reference = with_reference_images(reference, images, extractor)
    path = open_store(options.workspace_dir).add(reference)
    echo(f"{reference.key.source}: {path}")


@refs.command()
@click.argument("first")
@click.argument("second")
@json_option
@workspace_option
def compare(first: str, second: str, as_json: bool, workspace_dir: str | None) -> None:
    """Print the Fréchet distance between two references of one extractor."""
    from cmbench.metrics.reference_store import compare_references

    store = open_store(workspace_dir)
    found = compare_references(store.get(first), store.get(second))
    if as_json:
        echo(json.dumps(asdict(found), indent=1))
        return
    echo(f"Fréchet distance {found.frechet:.6g} ({found.relative:.3%} of the trace)")
    echo(f"share of the means: {found.mean_part:.1%}")


@refs.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@workspace_option
def export(name: str, file: Path, workspace_dir: str | None) -> None:
    """Write mean and covariance of NAME to FILE, an .npz in EDM's format."""
    from cmbench.metrics.reference_import import export_reference

    export_reference(open_store(workspace_dir).get(name), file)
    echo(str(file))


def facts(reference: Reference) -> dict[str, Any]:
    """Return the facts about a reference, ready for JSON."""
    return {
        **asdict(reference.key),
        "digest": reference.key.digest,
        "sha256": reference.moments.sha256,
        "count": reference.count,
        "dimensions": reference.moments.dim,
        "divisor": reference.moments.divisor,
        "features": None if reference.features is None else len(reference.features),
        "spatial": reference.spatial is not None,
        "floor": asdict(reference.floors) if reference.floors else None,
    }


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
