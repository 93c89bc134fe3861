"""``cmbench prepare``: datasets into the one format, weights into their place. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import click

from cmbench.cli.console import make_reporter
from cmbench.data.custom import custom_path, custom_target, is_custom, resolve_dataset, slug
from cmbench.data.locations import DATA_VARIABLE, DataLocations
from cmbench.data.preparation.run import Progress, Request
from cmbench.data.preparation.run import prepare as prepare_dataset
from cmbench.data.rules import RULES, Rule
from cmbench.data.store import MANIFEST, DatasetManifest, read_manifest
from cmbench.data.transforms import TRANSFORMS
from cmbench.data.verify import verify as verify_dataset
from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.plugin.manager import load_plugins
from cmbench.plugin.specs import DatasetSpec

#: Targets that are no datasets: name -> (``module:function``, what it is). The function is called
#: as ``function(source, locations, reporter)`` with ``source`` a path or None, and returns the line
#: to print.
WEIGHTS: dict[str, tuple[str, str]] = {
    "inception": (
        "cmbench.metrics.weight_files:prepare_inception",
        "2015 Inception as torch-fidelity publishes it: fid, is, kid, sfid",
    ),
    "clean-fid": (
        "cmbench.metrics.weight_files:prepare_clean_fid",
        "NVIDIA's TorchScript Inception: fid-clean, fid-legacy-tensorflow",
    ),
    "dinov2": (
        "cmbench.metrics.weight_files:prepare_dinov2",
        "DINOv2 ViT-L/14 as Meta publishes it: fd-dinov2",
    ),
}


class ReporterProgress:
    """Passes the stages of a preparation on to a reporter."""

    def __init__(self, title: str) -> None:
        self.reporter, self.title = make_reporter(), title
        self.stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show where the preparation is."""
        if stage != self.stage:
            self.finish()
            self.stage = stage
            if total:
                self.reporter.task_started(stage, f"{self.title}, {stage}", total, done)
            else:
                self.reporter.note(f"{self.title}, {stage}")
        if total:
            self.reporter.task_progress(stage, done, {})

    def finish(self) -> None:
        """End the stage that is shown."""
        if self.stage:
            self.reporter.task_finished(self.stage)
        self.stage = ""


@click.command()
@click.argument("target", required=False)
@click.option(
    "--source",
    "--from",
    "source",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Archive, folder or database to convert; or a file of weights.",
)
@click.option("--split", default="", metavar="NAME", help="Part of the source.  [default: train]")
@click.option(
    "--transform",
    type=click.Choice(list(TRANSFORMS)),
    default=None,
    help="Crop and resize, for folder:PATH and zip:PATH.",
)
@click.option(
    "--resolution",
    type=click.IntRange(1),
    metavar="PIXELS",
    help="Side of the images, for folder:PATH and zip:PATH.",
)
@click.option("--name", metavar="NAME", help="Name of the dataset, for folder:PATH and zip:PATH.")
@click.option("--subset", is_flag=True, help="Accept fewer images than the dataset has.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Worker processes.  [default: the free cores]",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=f"Where prepared datasets lie.  [env: {DATA_VARIABLE}]",
)
@click.option("--force", is_flag=True, help="Replace what is prepared already.")
@click.option("--restart", is_flag=True, help="Discard a preparation that was interrupted.")
@click.option("--verify", is_flag=True, help="Read a prepared dataset back and check its hashes.")
def prepare(
    target: str | None,
    source: Path | None,
    split: str,
    transform: str | None,
    resolution: int | None,
    name: str | None,
    subset: bool,
    workers: int | None,
    data_dir: Path | None,
    force: bool,
    restart: bool,
    verify: bool,
) -> None:
    """Convert a dataset (or weights) once, so that cmbench can read it fast.

    TARGET is a dataset, folder:PATH or zip:PATH, or weights; without it the targets are listed.
    Killed and started again, the same command resumes.

    \b
    Examples:
      cmbench prepare cifar10 --source cifar-10-python.tar.gz
      cmbench prepare imagenet64 --source ILSVRC/Data/CLS-LOC/train
      cmbench prepare folder:photos --transform adm-crop --resolution 64 --name photos64
      cmbench prepare cifar10 --verify
    """
    locations = DataLocations(data_dir) if data_dir else DataLocations()
    registered = load_plugins().datasets.specs
    if target is None:
        list_targets(registered, locations)
        return
    if target in WEIGHTS:
        click.echo(prepare_weights(target, source, locations))
        return
    if verify:
        manifest = check(target, registered, locations)
        click.echo(f"{manifest.dataset}: {manifest.count:,} images, all as they were prepared")
        return
    for option, given in (
        ("--transform", transform),
        ("--resolution", resolution),
        ("--name", name),
    ):
        if given is not None and not is_custom(target):
            raise UserError(
                option,
                f"{target!r} has its own",
                allowed="with folder:PATH or zip:PATH",
                remedy=f"leave {option} out",
            )
    path = source or (custom_path(target) if is_custom(target) else None)
    spec, rule = find_target(target, registered, path, transform, resolution, name, split)
    assert path is not None
    request = Request(path, split, transform or "", subset, workers, force, restart)
    show = ReporterProgress(spec.name)
    try:
        manifest, done = prepare_dataset(spec, rule, request, locations, show)
    finally:
        show.finish()
    for line in describe(manifest, locations, done):
        click.echo(line)


def find_target(
    target: str,
    registered: Mapping[str, DatasetSpec],
    path: Path | None,
    transform: str | None,
    resolution: int | None,
    name: str | None,
    split: str,
) -> tuple[DatasetSpec, Rule]:
    """Return what is to be prepared, and how."""
    if is_custom(target):
        chosen = name or slug(target)
        if chosen in registered or not chosen.replace("-", "").replace("_", "").isalnum():
            raise UserError(
                "--name",
                f"{chosen!r}",
                allowed="letters, digits, - and _, and no known dataset",
                remedy="choose another name",
            )
        assert path is not None
        return custom_target(chosen, path, transform or "", resolution, split)
    if target not in registered:
        raise unknown_name(
            "cmbench prepare",
            "target",
            target,
            [*registered, *WEIGHTS],
            see="run `cmbench prepare` alone to see what each needs",
        )
    spec = registered[target]
    if spec.embedded:
        raise UserError(
            "cmbench prepare",
            f"{target!r} is embedded and needs no preparation",
            remedy=f"use it at once: cmbench run --dataset {target}",
        )
    rule = RULES.get(target, Rule("its images"))
    if path is None:
        raise UserError(
            "cmbench prepare", f"{target!r} needs --source PATH", remedy=f"PATH is {rule.hint}"
        )
    return spec, rule


def prepare_weights(target: str, source: Path | None, locations: DataLocations) -> str:
    """Call the handler of a target that is no dataset."""
    module, _, function = WEIGHTS[target][0].partition(":")
    return str(getattr(import_module(module), function)(source, locations, make_reporter()))


def check(
    target: str, registered: Mapping[str, DatasetSpec], locations: DataLocations
) -> DatasetManifest:
    """Verify a prepared dataset."""
    spec = resolve_dataset(target, registered, locations, "cmbench prepare --verify")
    folder = locations.folder(spec.name)
    if not (folder / MANIFEST).exists():
        raise MissingError(
            "cmbench prepare --verify",
            f"{target!r} is not prepared in {folder}",
            remedy=f"run `cmbench prepare {target} --source PATH`",
        )
    show: Progress = ReporterProgress(spec.name)
    return verify_dataset(folder, show)


def describe(manifest: DatasetManifest, locations: DataLocations, done: bool) -> list[str]:
    """Return what is there now, as lines."""
    count, channels, height, width = manifest.shape
    kind = f"{manifest.num_classes} classes" if manifest.num_classes else "no labels"
    lines = [
        f"{manifest.dataset}: {count:,} images {channels}x{height}x{width}, {kind}"
        + ("" if done else " (prepared already)"),
        f"revision {manifest.revision}, SHA-256 {manifest.sha256}",
        f"in {locations.folder(manifest.dataset)}",
    ]
    if manifest.converted:
        found = ", ".join(f"{n} {mode}" for mode, n in sorted(manifest.converted.items()))
        lines.append(f"note: images of another pixel mode were converted: {found}")
    if "altered" in manifest.revision:
        lines.append("warning: the batches are not those that were published (their MD5 differs)")
    return lines


def list_targets(registered: Mapping[str, DatasetSpec], locations: DataLocations) -> None:
    """Print what can be prepared and what is."""
    click.echo(f"prepared datasets lie in {locations.data_dir}")
    for name, spec in registered.items():
        if spec.embedded:
            continue
        folder = locations.folder(name)
        state = "missing"
        if (folder / MANIFEST).exists():
            state = f"{read_manifest(folder).count:,} images"
        elif folder.with_name(f"{name}.partial").exists():
            state = "interrupted"
        hint = RULES[name].hint if name in RULES else ""
        click.echo(f"{name:<18} {state:<18} {hint}".rstrip())
    for name, (_, title) in WEIGHTS.items():
        click.echo(f"{name:<18} {'weights':<18} {title}")
