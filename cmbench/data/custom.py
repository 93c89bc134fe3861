"""Datasets of a user: ``folder:PATH``, ``zip:PATH``, and those prepared under a name.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from cmbench.data.locations import DataLocations
from cmbench.data.npy import npy_from_bytes
from cmbench.data.pictures import UNREADABLE, PictureError, picture_shape, unreadable
from cmbench.data.rules import CUSTOM_RULE, RULES, Rule
from cmbench.data.sources.base import ARRAY_SUFFIX, EncodedSource, ImageIndex
from cmbench.data.sources.detect import open_source
from cmbench.data.store import MANIFEST, DatasetManifest, read_manifest
from cmbench.data.transforms import TRANSFORMS
from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.files import expanded
from cmbench.plugin.specs import DatasetSpec

_PREFIXES = ("folder:", "zip:")
_FACTORY = "cmbench.data.prepared:build"
#: Labels in a file may be any numbers; more classes than this are refused.
_MOST_CLASSES = 100_000
#: Images, spread evenly, that decide whether the data are grey.
_LOOKED_AT = 64


def is_custom(name: str) -> bool:
    """Return whether ``name`` is ``folder:PATH`` or ``zip:PATH``."""
    return name.startswith(_PREFIXES)


def custom_path(name: str) -> Path:
    """Return the path of ``folder:PATH`` or ``zip:PATH``."""
    kind, _, path = name.partition(":")
    if not path:
        raise UserError(
            f"dataset {name!r}",
            "names no path",
            allowed=f"{kind}:PATH",
            remedy=f"for example {kind}:./images",
        )
    return expanded(path)


def slug(name: str) -> str:
    """Return the name that ``folder:PATH`` gets: kind, stem and a hash of the path."""
    kind, _, _ = name.partition(":")
    path = custom_path(name).resolve()
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "data"
    return f"{kind}-{stem[:40]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def spec_of(name: str, shape: tuple[int, int, int], num_classes: int) -> DatasetSpec:
    """Return the spec of a dataset that no plugin registered, with the papers' protocol."""
    return DatasetSpec(
        name=name,
        factory=_FACTORY,
        title=f"{name}, {shape[1]}x{shape[2]}, {num_classes or 'no'} classes",
        data_shape=shape,
        num_classes=num_classes,
        extractor="inception",
        metrics=("fid", "is", "precision", "recall", "kid"),
        nfe=(1, 2, 4),
        num_samples=50_000,
        source="a user's own images",
    )


def _from_manifest(manifest: DatasetManifest) -> DatasetSpec:
    _, channels, height, width = manifest.shape
    return spec_of(manifest.dataset, (channels, height, width), manifest.num_classes)


def resolve_dataset(
    name: str, registered: Mapping[str, DatasetSpec], locations: DataLocations, who: str = "cmbench"
) -> DatasetSpec:
    """Return the spec that ``name`` means: a registered one, or one that was prepared here.

    Raises:
        MissingError: if ``folder:PATH`` is not prepared, with the command that does it.
        UserError: if the dataset does not exist.
    """
    if name in registered:
        return registered[name]
    folder = locations.folder(slug(name) if is_custom(name) else name)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if is_custom(name):
            _require_unchanged(name, manifest)
        return _from_manifest(manifest)
    if is_custom(name) and not custom_path(name).exists():
        raise MissingError(
            f"dataset {name!r}",
            f"{custom_path(name)} does not exist",
            allowed="a folder or a zip of images",
            remedy="check the path",
        )
    if is_custom(name):
        raise MissingError(
            f"dataset {name!r}",
            f"is not prepared in {locations.data_dir}",
            remedy=f"run `cmbench prepare {name}`",
        )
    prepared = [p.parent.name for p in locations.data_dir.glob(f"*/{MANIFEST}")]
    raise unknown_name(who, "dataset", name, {*registered, *prepared})


def _require_unchanged(name: str, manifest: DatasetManifest) -> None:
    """Raise ``UserError`` if the files of ``folder:PATH`` are not those that were prepared.

    Their names, sizes and times of change are compared. A source that is gone is not asked for.
    """
    path = custom_path(name)
    if path.exists() and _fingerprint(path, manifest.source.split) != manifest.source.fingerprint:
        raise UserError(
            f"dataset {name!r}",
            "its files have changed since they were prepared (names, sizes or times of change)",
            remedy=f"run `cmbench prepare {name} --force` with the same options, or prepare it "
            "under another --name",
        )


@cache
def _fingerprint(path: Path, split: str) -> str:
    """Return the fingerprint of a source's files; looked at once per process."""
    found = open_source(path, split)
    return found.index().fingerprint if isinstance(found, EncodedSource) else ""


def prepared_here(
    registered: Mapping[str, DatasetSpec], locations: DataLocations
) -> tuple[list[DatasetSpec], list[str]]:
    """Return the specs of datasets that were prepared here and that no plugin registered.

    Those whose manifest is damaged have a line each instead.
    """
    found, problems = [], []
    for path in sorted(locations.data_dir.glob(f"*/{MANIFEST}")):
        if path.parent.name not in registered:
            try:
                found.append(_from_manifest(read_manifest(path.parent)))
            except UserError as error:
                problems.append(str(error))
    return found, problems


def custom_target(
    name: str, source: Path, transform: str, resolution: int | None, split: str
) -> tuple[DatasetSpec, Rule]:
    """Return the spec and the rule that a user's images get as dataset ``name``.

    The resolution is that of the first image unless a transform changes it; the data are grey if
    all of a sample of the images are.
    """
    found = open_source(source, split)
    if not isinstance(found, EncodedSource) or found.kind not in CUSTOM_RULE.kinds:
        raise found.error(
            "cannot be a dataset of its own",
            allowed="a folder, a zip or an LMDB of images",
            remedy=f"prepare it under its own name: {', '.join(RULES)}",
        )
    if found.kind == "tar":
        raise found.error("must be unpacked first", remedy="unpack it and give the folder")
    index = found.index()
    channels, height, width = _shape_of(found, index)
    size = resolution or width
    if transform in ("", "none") and (height, width) != (size, size):
        raise found.error(
            f"its first image, {index.names[0]!r}, is {width}x{height}",
            allowed=f"{size}x{size}" if resolution or height == width else "square images",
            remedy=f"add --transform ({', '.join(t for t in TRANSFORMS if t != 'none')}) and "
            "--resolution",
        )
    rule = replace(CUSTOM_RULE, transform=transform or "none")
    return spec_of(name, (channels, size, size), _classes(found, index)), rule


def _shape_of(source: EncodedSource, index: ImageIndex) -> tuple[int, int, int]:
    """Return channels, height and width: the first image's size; RGB if one of a sample is."""
    shapes = []
    reader = source.reader()
    try:
        for i in range(0, len(index), -(-len(index) // _LOOKED_AT)):
            name = index.names[i]
            shapes.append(_image_shape(name, reader.read(index.locators[i])))
    except UNREADABLE as error:
        raise unreadable(source.who, name, error) from None
    finally:
        reader.close()
    return max(channels for channels, _, _ in shapes), *shapes[0][1:]


def _image_shape(name: str, data: bytes) -> tuple[int, int, int]:
    if not name.endswith(ARRAY_SUFFIX):
        return picture_shape(data)
    shape = npy_from_bytes(data).shape
    if len(shape) != 3:
        raise PictureError(f"is an array of shape {shape}", allowed="[C, H, W]")
    return (shape[0], shape[1], shape[2])


def _classes(source: EncodedSource, index: ImageIndex) -> int:
    """Return the number of classes of a user's images, 0 without labels."""
    if index.labels is None:
        return 0
    for label in (min(index.labels), max(index.labels)):
        if not 0 <= label < _MOST_CLASSES:
            name = index.names[index.labels.index(label)]
            raise source.error(
                f"label {label} of image {name!r} is out of range",
                allowed=f"0 … {_MOST_CLASSES - 1:,}",
                remedy="number the classes from 0",
            )
    return max(len(index.class_names), max(index.labels) + 1)
