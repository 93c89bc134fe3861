"""``cmbench prepare``: convert datasets, install weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.console import make_reporter
from cmbench.cli.options import argument, flag, option, takes
from cmbench.cli.output import echo
from cmbench.data.custom import custom_path, custom_target, is_custom, resolve_dataset, slug
from cmbench.data.locations import DATA_VARIABLE, DataLocations
from cmbench.data.preparation.run import Request
from cmbench.data.preparation.run import prepare as prepare_dataset
from cmbench.data.rules import RULES, Rule
from cmbench.data.sources.base import describe_passed_over
from cmbench.data.store import MANIFEST, DatasetManifest, read_manifest
from cmbench.data.transforms import TRANSFORMS
from cmbench.data.verify import verify as verify_dataset
from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.plugin.manager import load_plugins
from cmbench.plugin.specs import DatasetSpec

#: Targets that are not datasets but weights of extractors, and what each is.
WEIGHTS = {
    "inception": "2015 Inception as torch-fidelity publishes it: fid, is, kid, sfid",
    "clean-fid": "NVIDIA's TorchScript Inception: fid-clean, fid-legacy-tensorflow",
    "dinov2": "DINOv2 ViT-L/14 as Meta publishes it: fd-dinov2",
}


class ReporterProgress:
    """Passes the stages of a preparation on to a reporter."""

    def __init__(self, title: str) -> None:
        self.reporter, self.title = make_reporter(), title
        self.stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of the preparation."""
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


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What the user asked of `cmbench prepare`."""

    target: str | None = argument(required=False)
    source: Path | None = option(
        "--source",
        "--from",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Archive, folder or database to convert, or a file of weights.",
    )
    split: str = option(
        "--split",
        default="",
        show_default=False,
        metavar="NAME",
        help="Part of the source.  [default: train]",
    )
    transform: str | None = option(
        "--transform",
        type=click.Choice(list(TRANSFORMS)),
        help="Crop and resize, for folder:PATH and zip:PATH.",
    )
    resolution: int | None = option(
        "--resolution",
        type=click.IntRange(1),
        metavar="PIXELS",
        help="Side of the images, for folder:PATH and zip:PATH.",
    )
    name: str | None = option(
        "--name", metavar="NAME", help="Name of the dataset, for folder:PATH and zip:PATH."
    )
    subset: bool = flag("--subset", help="Accept fewer images than the dataset has.")
    workers: int | None = option(
        "--workers",
        type=click.IntRange(1),
        metavar="N",
        help="Worker processes.  [default: the free cores]",
    )
    data_dir: Path | None = option(
        "--data-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help=f"Folder of prepared datasets.  [env: {DATA_VARIABLE}]",
    )
    force: bool = flag("--force", help="Replace a dataset that is already prepared.")
    restart: bool = flag("--restart", help="Discard an interrupted preparation.")
    verify: bool = flag("--verify", help="Read a prepared dataset back and check its hashes.")


@click.command()
@takes(PrepareOptions)
def prepare(options: PrepareOptions) -> None:
    """Convert a dataset (or weights) once, so that cmbench can read it fast.

    TARGET is a dataset, folder:PATH or zip:PATH, or weights; without it the targets are listed. If
    the command is killed, the same command resumes.

    \b
    Examples:
      cmbench prepare cifar10 --source cifar-10-python.tar.gz
      cmbench prepare imagenet64 --source ILSVRC/Data/CLS-LOC/train
      cmbench prepare folder:photos --transform adm-crop --resolution 64 --name photos64
      cmbench prepare cifar10 --verify
    """
    locations = DataLocations(options.data_dir) if options.data_dir else DataLocations()
    registered = load_plugins().datasets.specs
    if options.target is None:
        list_targets(registered, locations)
    elif options.target in WEIGHTS:
        echo(prepare_weights(options.target, options.source, locations))
    elif options.verify:
        manifest = check(options.target, registered, locations)
        echo(f"{manifest.dataset}: {manifest.count:,} images are unchanged")
    else:
        convert(options, registered, locations)


def convert(
    options: PrepareOptions, registered: Mapping[str, DatasetSpec], locations: DataLocations
) -> None:
    """Prepare a dataset and print what was made."""
    spec, rule, path = find_target(options, registered)
    request = Request(
        path,
        options.split,
        options.transform or "",
        options.subset,
        options.workers,
        options.force,
        options.restart,
    )
    show = ReporterProgress(spec.name)
    try:
        manifest, done = prepare_dataset(spec, rule, request, locations, show)
    finally:
        show.finish()
    for line in describe(manifest, locations, done):
        echo(line)


def find_target(
    options: PrepareOptions, registered: Mapping[str, DatasetSpec]
) -> tuple[DatasetSpec, Rule, Path]:
    """Return what is to be prepared, how, and from where."""
    target = options.target or ""
    if is_custom(target):
        require_no_other_source(options)
        name = options.name or slug(target)
        if name in registered or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(
                "--name",
                f"{name!r}",
                allowed="letters, digits, - and _, and no known dataset",
                remedy="choose another name",
            )
        path = custom_path(target)
        transform, resolution = options.transform or "", options.resolution
        return *custom_target(name, path, transform, resolution, options.split), path
    require_no_own_settings(options)
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
            f"{target!r} is built in and needs no preparation",
            remedy=f"use it directly: cmbench run --dataset {target}",
        )
    rule = RULES.get(target, Rule("its images"))
    if options.source is None:
        raise UserError(
            "cmbench prepare", f"{target!r} needs --source PATH", remedy=f"PATH is {rule.hint}"
        )
    return spec, rule, options.source


def require_no_other_source(options: PrepareOptions) -> None:
    """Raise ``UserError`` for a source beside the one that ``folder:PATH`` names."""
    if options.source is not None:
        raise UserError(
            "--source",
            f"{str(options.source)!r}, but {options.target!r} names the source itself",
            allowed=f"{options.target} alone",
            remedy="leave --source out",
        )


def require_no_own_settings(options: PrepareOptions) -> None:
    """Raise ``UserError`` for a setting that only own images take."""
    for name, given in (
        ("--transform", options.transform),
        ("--resolution", options.resolution),
        ("--name", options.name),
    ):
        if given is not None:
            raise UserError(
                name,
                f"{options.target!r} has its own",
                allowed="with folder:PATH or zip:PATH",
                remedy=f"leave {name} out",
            )


def prepare_weights(target: str, source: Path | None, locations: DataLocations) -> str:
    """Install the weights of an extractor and return the line to print."""
    from cmbench.metrics.weight_files import prepare_target  # imports torch

    return prepare_target(target, source, locations)


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
    return verify_dataset(folder, ReporterProgress(spec.name))


def describe(manifest: DatasetManifest, locations: DataLocations, done: bool) -> list[str]:
    """Return what was prepared, as lines."""
    count, channels, height, width = manifest.shape
    kind = f"{manifest.num_classes} classes" if manifest.num_classes else "no labels"
    lines = [
        f"{manifest.dataset}: {count:,} images {channels}x{height}x{width}, {kind}"
        + ("" if done else " (already prepared)"),
        f"revision {manifest.revision}, SHA-256 {manifest.sha256}",
        f"in {locations.folder(manifest.dataset)}",
    ]
    lines += [
        f"note: {n:,} of {count:,} images {what}" for what, n in sorted(manifest.converted.items())
    ]
    if manifest.lossy:
        lines.append("note: some images are JPEG or lossy WebP, with artefacts of compression")
    if manifest.source.passed_over:
        lines.append(f"note: {describe_passed_over(manifest.source.passed_over)}")
    if "altered" in manifest.revision:
        lines.append("warning: the MD5 of the batches differs from that of the published ones")
    return lines


def list_targets(registered: Mapping[str, DatasetSpec], locations: DataLocations) -> None:
    """Print what can be prepared and the state of each."""
    echo(f"prepared datasets are in {locations.data_dir}")
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
        echo(f"{name:<18} {state:<18} {hint}".rstrip())
    for name, title in WEIGHTS.items():
        echo(f"{name:<18} {'weights':<18} {title}")
