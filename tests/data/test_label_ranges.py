"""Every kind of source that checks labels takes the first and the last class, and none beyond."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from dataset_builders import cifar_archive, class_folder, edm_zip, pictures

from cmbench.data import custom
from cmbench.data.custom import custom_target
from cmbench.data.locations import DataLocations
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.rules import Rule
from cmbench.data.sources.base import ArraySource
from cmbench.data.sources.detect import open_source
from cmbench.data.store import open_store
from cmbench.errors import UserError
from cmbench.plugin.specs import DatasetSpec

CLASSES = 3


def edm_archive(folder: Path, labels: Sequence[int]) -> Path:
    return edm_zip(folder / "a.zip", pictures(len(labels)), list(labels))


def edm_folder(folder: Path, labels: Sequence[int]) -> Path:
    root = folder / "a"
    class_folder(root, pictures(len(labels)), ("all",))
    rows = [[f"all/{i:05d}.png", label] for i, label in enumerate(labels)]
    (root / "dataset.json").write_text(json.dumps({"labels": rows}))
    return root


def cifar(folder: Path, labels: Sequence[int]) -> Path:
    count = max(5, len(labels))  # one in each of the five batches
    padded = [*labels, *[labels[0]] * (count - len(labels))]
    return cifar_archive(folder / "cifar-10-python.tar.gz", pictures(count, 32), padded)


def imagenet(folder: Path, labels: Sequence[int], *, packed: bool) -> Path:
    batch = {"data": np.zeros((len(labels), 12288), np.uint8), "labels": list(labels)}
    if packed:
        np.savez(folder / "train_data_batch_1.npz", **batch)  # type: ignore[arg-type]
    else:
        (folder / "train_data_batch_1").write_bytes(pickle.dumps(batch))
    return folder


class Kind(NamedTuple):
    """How to write a source of those labels, and the first and last label that it may have."""

    write: Callable[[Path, Sequence[int]], Path]
    first: int
    last: int


def imagenet_npz(folder: Path, labels: Sequence[int]) -> Path:
    return imagenet(folder, labels, packed=True)


def imagenet_pickle(folder: Path, labels: Sequence[int]) -> Path:
    return imagenet(folder, labels, packed=False)


PREPARED = [Kind(edm_archive, 0, CLASSES - 1), Kind(edm_folder, 0, CLASSES - 1)]
BATCHES = [Kind(cifar, 0, 9), Kind(imagenet_npz, 1, 1000), Kind(imagenet_pickle, 1, 1000)]


def name_of(value: object) -> str | None:
    return value.write.__name__ if isinstance(value, Kind) else None


@pytest.fixture
def labelled(spec: DatasetSpec) -> DatasetSpec:
    return spec._replace(num_classes=CLASSES)


@pytest.mark.parametrize("kind", PREPARED, ids=name_of)
def test_a_dataset_with_a_table_of_labels(
    tmp_path: Path, labelled: DatasetSpec, rule: Rule, locations: DataLocations, kind: Kind
) -> None:
    path = kind.write(tmp_path, [kind.last, kind.first, kind.last])
    prepare(labelled, rule, Request(path), locations)
    labels = open_store(locations.folder("tiny")).labels
    assert labels is not None
    assert labels.tolist() == [kind.last, kind.first, kind.last]


@pytest.mark.parametrize("step", [-1, 1])
@pytest.mark.parametrize("kind", PREPARED, ids=name_of)
def test_a_dataset_with_a_label_beyond_its_classes(
    tmp_path: Path,
    labelled: DatasetSpec,
    rule: Rule,
    locations: DataLocations,
    kind: Kind,
    step: int,
) -> None:
    beyond = kind.last + 1 if step > 0 else kind.first - 1
    path = kind.write(tmp_path, [0, beyond, 1])
    with pytest.raises(UserError, match=rf"label {beyond} of image .*: 0 … {CLASSES - 1};"):
        prepare(labelled, rule, Request(path), locations)


@pytest.mark.parametrize("kind", BATCHES, ids=name_of)
def test_batches_of_the_first_and_the_last_class(tmp_path: Path, kind: Kind) -> None:
    source = open_source(kind.write(tmp_path, [kind.last, kind.first]))
    assert isinstance(source, ArraySource)
    found = [y for chunk in source.chunks() for y in chunk.labels.tolist()]  # type: ignore[union-attr]
    assert set(found) == {0, kind.last - kind.first}


@pytest.mark.parametrize("step", [-1, 1])
@pytest.mark.parametrize("kind", BATCHES, ids=name_of)
def test_batches_with_a_label_beyond_their_classes(tmp_path: Path, kind: Kind, step: int) -> None:
    beyond = kind.last + 1 if step > 0 else kind.first - 1
    source = open_source(kind.write(tmp_path, [kind.first, beyond]))
    assert isinstance(source, ArraySource)
    with pytest.raises(UserError, match=rf"holds label {beyond} .*: {kind.first} … {kind.last};"):
        list(source.chunks())


@pytest.mark.parametrize("folders", [CLASSES - 1, CLASSES, CLASSES + 1])
def test_as_many_class_folders_as_classes(
    tmp_path: Path, labelled: DatasetSpec, rule: Rule, locations: DataLocations, folders: int
) -> None:
    class_folder(tmp_path / "s", pictures(2 * folders), tuple("abcd"[:folders]))
    if folders == CLASSES:
        manifest, _ = prepare(labelled, rule, Request(tmp_path / "s"), locations)
        assert manifest.class_counts == [2] * CLASSES
        return
    with pytest.raises(UserError, match=rf"has {folders} class folders .*; allowed: {CLASSES};"):
        prepare(labelled, rule, Request(tmp_path / "s"), locations)


@pytest.mark.parametrize("write", [edm_archive, edm_folder])
def test_a_dataset_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    monkeypatch.setattr(custom, "_MOST_CLASSES", CLASSES)
    found, _ = custom_target("own", write(tmp_path, [0, CLASSES - 1]), "", None, "")
    assert found.num_classes == CLASSES
    for beyond in (-1, CLASSES):
        folder = tmp_path / str(beyond)
        folder.mkdir()
        with pytest.raises(UserError, match=rf"label {beyond} of image .*: 0 … {CLASSES - 1};"):
            custom_target("own", write(folder, [0, beyond]), "", None, "")
