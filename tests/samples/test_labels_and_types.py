"""Classes of samples are those of the dataset; arrays of any number type are read or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmbench.errors import EXIT_USAGE, UserError
from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace
from cmbench.samples.generators import GeneratorSamples
from cmbench.samples.opening import open_samples
from cmbench.samples.source import ReadOptions, plain_tensor

Command = Callable[..., Any]
ANIMALS = ("bird", "cat", "dog")


def class_folders(folder: Path, *names: str, count: int = 2) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            drawn = np.random.RandomState(99 * number + i).randint(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(drawn).save(folder / name / f"{i}.png")
    return folder


def labels_of(path: Path, **options: Any) -> tuple[list[int] | None, list[str]]:
    source = open_samples(str(path), ReadOptions(**options))
    batches = list(source.batches(100))
    found = [b.labels.tolist() for b in batches if b.labels is not None]
    return ([label for part in found for label in part] if found else None), source.notes


# ---- class folders -------------------------------------------------------------------------------


def test_class_folders_are_numbered_by_the_datasets_names(tmp_path: Path) -> None:
    path = class_folders(tmp_path / "s", "dog", "bird")
    assert labels_of(path, num_classes=3, class_names=ANIMALS)[0] == [0, 0, 2, 2]
    assert labels_of(path)[0] == [0, 0, 1, 1], "nothing is known: by position"


def test_numbers_are_classes_where_names_are_not_known(tmp_path: Path) -> None:
    path = class_folders(tmp_path / "s", "7", "10", "3")
    assert labels_of(path, num_classes=11)[0] == [10, 10, 3, 3, 7, 7]
    with pytest.raises(
        UserError, match=r"not classes of the dataset: 10; allowed: 0, 1, .*name each"
    ):
        labels_of(path, num_classes=10)


def test_a_folder_that_is_no_class_among_classes_is_refused(tmp_path: Path) -> None:
    path = class_folders(tmp_path / "s", "dog", "frog")
    with pytest.raises(
        UserError, match=r"not classes of the dataset: frog; allowed: bird, cat, dog"
    ):
        labels_of(path, num_classes=3, class_names=ANIMALS)


def test_folders_of_which_none_is_a_class_are_not_labels(tmp_path: Path) -> None:
    path = class_folders(tmp_path / "s", "000000", "001000")
    labels, notes = labels_of(path, num_classes=10)
    assert labels is None
    assert notes[0].endswith("not classes of the dataset: 000000, 001000; labels were not read")


def test_as_many_unknown_folders_as_classes_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    path = class_folders(tmp_path / "s", "n02", "n01")
    labels, notes = labels_of(path, num_classes=2)
    assert (labels, notes[0]) == ([0, 0, 1, 1], "class folders are numbered in sorted order")


def test_class_folders_on_digits(cmbench: Command, workspace: Workspace, tmp_path: Path) -> None:
    """Folders 5 to 14 are not the classes 0 to 9."""
    options = ("-d", "digits", "--nfe", "1", "-q")
    many = class_folders(tmp_path / "many", *map(str, range(5, 15)))
    done = cmbench("eval", str(many), *options)
    assert done.code == EXIT_USAGE
    assert "not classes of the dataset: 10, 11, 12, 13, 14; allowed: 0, 1, 2" in done.err
    few = class_folders(tmp_path / "few", "5", "9", count=20)
    assert cmbench("eval", str(few), *options).code == 0
    (path,) = workspace.records("digits").glob("*.json")
    assert read_record(path).sampling.labels == "counts by class: 5: 20, 9: 20"


def test_class_folders_on_an_own_dataset(
    cmbench: Command, workspace: Workspace, tmp_path: Path
) -> None:
    real = class_folders(tmp_path / "real", *ANIMALS, count=20)
    assert cmbench("prepare", f"folder:{real}", "--name", "animals").code == 0
    samples = class_folders(tmp_path / "s", "cat", "dog", count=20)
    options = ("--metrics", "fd-pixels", "--extractor", "pixels", "--nfe", "1", "-q")
    done = cmbench("eval", str(samples), "-d", "animals", *options)
    assert done.code == 0, done.err
    (path,) = workspace.records("animals").glob("*.json")
    assert read_record(path).sampling.labels == "counts by class: 1: 20, 2: 20"


# ---- arrays --------------------------------------------------------------------------------------


def test_which_of_several_arrays_is_read_is_said(tmp_path: Path) -> None:
    images, other = np.zeros((4, 8, 8, 3), np.uint8), np.ones((4, 8, 8, 3), np.uint8)
    path = tmp_path / "s.npz"
    np.savez(path, samples=other, images=images, labels=np.arange(4), y=np.zeros(4, int))
    labels, notes = labels_of(path)
    assert labels == [0, 1, 2, 3]
    assert "images are read from 'images'; the file also holds 'samples'" in notes
    assert "labels are read from 'labels'; the file also holds 'y'" in notes
    np.savez(path, arr_0=images, classes=np.arange(4))
    labels, notes = labels_of(path)
    assert labels is None
    assert "no labels: none of the arrays classes is arr_1, labels, label, y" in notes
    np.savez(path, arr_0=images, arr_1=np.arange(4))
    assert labels_of(path) == ([0, 1, 2, 3], [])


def test_labels_beyond_the_datasets_classes_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 3]))
    assert labels_of(tmp_path / "s.npz", num_classes=4)[0] == [0, 1, 2, 3]
    labels, notes = labels_of(tmp_path / "s.npz", num_classes=3)
    assert labels is None
    assert "labels from 0 to 3 are not classes of the dataset (0 … 2): they were not read" in notes


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f8", np.longdouble, np.float16, ">f2"])
def test_floats_of_any_byte_order_and_size_are_read(tmp_path: Path, dtype: Any) -> None:
    values = np.random.RandomState(0).uniform(-1, 1, (4, 8, 8, 3)).astype(dtype)
    np.save(tmp_path / "s.npy", values)
    (batch,) = open_samples(str(tmp_path / "s.npy"), ReadOptions(value_range="-1,1")).batches(4)
    wanted = torch.from_numpy(values.astype(np.float64)).permute(0, 3, 1, 2).float()
    assert torch.equal(batch.images, ((wanted.double() + 1) / 2 * 2 - 1).float())
    labelled = np.arange(4).astype(">i4")
    np.savez(tmp_path / "s.npz", values, labelled)
    assert labels_of(tmp_path / "s.npz", value_range="-1,1")[0] == [0, 1, 2, 3]


def test_plain_tensors_share_memory_where_they_can() -> None:
    array = np.arange(4, dtype=np.float32)
    assert plain_tensor(array).data_ptr() == array.ctypes.data
    assert plain_tensor(array.astype(">f4")).tolist() == [0, 1, 2, 3]
    assert plain_tensor(array.astype(np.longdouble)).dtype == torch.float64
    with pytest.raises(TypeError):
        plain_tensor(np.array(["a"]))


# ---- generators ----------------------------------------------------------------------------------


def generated(make: Callable[[int], Any], **options: Any) -> Any:
    source = GeneratorSamples(
        "my:generator", lambda indices, seed: make(len(indices)), ReadOptions(limit=4, **options)
    )
    (batch,) = source.batches(4)
    return batch


def test_graded_tensors_are_read(cmbench: Command) -> None:
    weight = torch.zeros(3, 8, 8, requires_grad=True)

    def graded(count: int) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return weight.expand(count, 3, 8, 8) * 2

    batch = generated(graded)
    assert not batch.images.requires_grad
    assert batch.images.numpy().shape == (4, 3, 8, 8)


@pytest.mark.parametrize("dtype", [">f4", np.longdouble])
def test_arrays_of_generators_of_any_byte_order_and_size(dtype: Any) -> None:
    values = np.full((4, 3, 8, 8), 0.25).astype(dtype)
    assert float(generated(lambda count: values[:count]).images.mean()) == 0.25


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (np.full((4, 3, 8, 8), "a"), "returned ndarray, NoneType; allowed: an array of numbers"),
        ((torch.zeros(4, 3, 8, 8), [1, 2, 3, 4]), "returned Tensor, list; allowed"),
        ((torch.zeros(4, 3, 8, 8), None, None), "returned Tensor, NoneType, NoneType; allowed"),
        (None, "returned NoneType, NoneType; allowed"),
    ],
)
def test_what_no_images_are_is_one_line(found: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        generated(lambda count: found)
    assert "\n" not in str(caught.value)


# ---- data without bytes --------------------------------------------------------------------------


def test_bytes_are_no_samples_of_points(cmbench: Command, tmp_path: Path) -> None:
    shape = (40, 8, 8, 1)
    drawn = np.random.RandomState(0)
    np.save(tmp_path / "bytes.npy", drawn.randint(0, 256, shape, dtype=np.uint8))
    done = cmbench("eval", str(tmp_path / "bytes.npy"), "-d", "gmm-8x8", "--nfe", "1", "-q")
    assert done.code == EXIT_USAGE
    (line,) = [text for text in done.err.splitlines() if text.startswith("error")]
    assert "are bytes, and the values of dataset 'gmm-8x8' are not; allowed: floats" in line
    np.save(tmp_path / "floats.npy", drawn.uniform(-1, 1, shape).astype(np.float32))
    options = ("-d", "gmm-8x8", "--nfe", "1", "-q", "--range", "-1,1")
    assert cmbench("eval", str(tmp_path / "floats.npy"), *options).code == 0
