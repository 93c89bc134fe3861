"""``cmbench refs``: the references on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.main import workspace_option

if TYPE_CHECKING:
    from cmbench.metrics.reference import Reference
    from cmbench.metrics.reference_store import ReferenceStore


def open_store(workspace: str | None) -> ReferenceStore:
    """Return the references of a workspace: imported ones, and computed ones from its cache."""
    from cmbench.metrics.reference_store import ReferenceStore
    from cmbench.records.workspace import Workspace

    chosen = Workspace.choose(workspace)
    return ReferenceStore(chosen.root / "references", chosen.cache / "references")


@click.group()
def refs() -> None:
    """List, show, import and compare reference statistics."""


@refs.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@workspace_option
def list_refs(as_json: bool, workspace: str | None) -> None:
    """List the references of the workspace."""
    from cmbench.cli.results import echo_table

    entries = list(open_store(workspace).entries())
    if as_json:
        found = [
            {
                "name": entry.name,
                **(facts(entry.reference) if entry.reference else {}),
                "problem": entry.problem,
            }
            for entry in entries
        ]
        click.echo(json.dumps(found, indent=1))
        return
    rows = []
    for entry in entries:
        if entry.reference is None:
            rows.append([entry.name, "-", "-", "-", "-", "damaged"])
            click.echo(f"warning: {entry.problem}", err=True)
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
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@workspace_option
def show(name: str, as_json: bool, workspace: str | None) -> None:
    """Show what is known of the reference NAME (or of a file)."""
    known = facts(open_store(workspace).get(name))
    if as_json:
        click.echo(json.dumps(known, indent=1))
        return
    for key, value in known.items():
        click.echo(f"{key:<16} {value}")


@refs.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", default=None, help="What to call it.  [default: FILE]")
@click.option(
    "--extractor",
    metavar="NAME",
    default=None,
    help="Which extractor made it.  [default: by its format]",
)
@click.option(
    "--count",
    type=click.IntRange(min=2),
    metavar="N",
    default=None,
    help="Images behind it, if you know.",
)
@click.option(
    "--entry",
    metavar="NAME",
    default="fid",
    show_default=True,
    help="Which statistics of an EDM2 file.",
)
@click.option(
    "--images/--no-images",
    default=True,
    show_default=True,
    help="Extract the images in an OpenAI batch, for precision, recall and KID.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=None,
    help="The extractor's weights for --images, if they lie elsewhere.",
)
@workspace_option
def import_(file: Path, workspace: str | None, **options: Any) -> None:
    """Import reference statistics of EDM, clean-fid, OpenAI, torch-fidelity or EDM2."""
    from cmbench.metrics.reference_import import import_reference

    reference = import_reference(
        file,
        name=options["name"],
        extractor=options["extractor"],
        count=options["count"],
        entry=options["entry"],
    )
    if options["images"] and reference.key.origin == "openai":
        reference = _with_images(reference, file, options["weights"])
    path = open_store(workspace).add(reference)
    click.echo(f"{reference.key.source}: {path}")


def _with_images(reference: Reference, file: Path, weights: Path | None) -> Reference:
    from cmbench.metrics.inception import InceptionExtractor
    from cmbench.metrics.reference_import import with_reference_images
    from cmbench.samples.opening import open_samples

    images = (batch for batch, _ in open_samples(str(file)).batches(250))
    return with_reference_images(reference, images, InceptionExtractor(weights))


@refs.command()
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@workspace_option
def compare(first: str, second: str, as_json: bool, workspace: str | None) -> None:
    """Print the Fréchet distance between two references of one extractor."""
    from cmbench.metrics.reference_store import compare_references

    store = open_store(workspace)
    found = compare_references(store.get(first), store.get(second))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    click.echo(f"Fréchet distance {found.frechet:.6g} ({found.relative:.3%} of the trace)")
    click.echo(f"of which the means make {found.mean_part:.1%}")


@refs.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@workspace_option
def export(name: str, file: Path, workspace: str | None) -> None:
    """Write mean and covariance of NAME to FILE, an .npz as EDM's are."""
    from cmbench.metrics.reference_import import export_reference

    export_reference(open_store(workspace).get(name), file)
    click.echo(str(file))


def facts(reference: Reference) -> dict[str, Any]:
    """Return what is known of a reference, ready for JSON."""
    return {
        **asdict(reference.key),
        "digest": reference.key.digest,
        "sha256": reference.sha256,
        "count": reference.count,
        "dimensions": reference.moments.dim,
        "divisor": reference.moments.divisor,
        "features": None if reference.features is None else len(reference.features),
        "spatial": reference.spatial is not None,
        "floor": reference.halves_floor.frechet if reference.halves_floor else None,
    }


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
