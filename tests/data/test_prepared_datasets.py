from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_builders import class_folder, edm_zip, encode, pictures

from cmbench.data import latents
from cmbench.data.base import load_dataset
from cmbench.data.catalog import BUILTIN_DATASETS
from cmbench.data.custom import custom_target, resolve_dataset, slug
from cmbench.data.locations import DataLocations
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.prepared import PreparedDataset, build
from cmbench.data.rules import RULES, Rule
from cmbench.data.streaming import DEPTH, Key, ReadAhead
from cmbench.errors import MissingError, UserError
from cmbench.plugin.specs import DatasetSpec, load_object

SPECS = {spec.name: spec for spec in BUILTIN_DATASETS}
CPU = torch.device("cpu")


@pytest.fixture
def dataset(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> PreparedDataset:
    path = edm_zip(tmp_path / "a.zip", pictures(50), [i % 3 for i in range(50)])
    prepare(spec, rule, Request(path), locations)
    return build(spec, locations)


def test_a_prepared_dataset_gives_the_pictures(dataset: PreparedDataset) -> None:
    images = torch.from_numpy(pictures(50).transpose(0, 3, 1, 2).copy())
    assert dataset.class_counts == (17, 17, 16)
    assert torch.equal(torch.cat(list(dataset.reference_images(7))), images)
    batch = dataset.batch(40, 30, 2)
    assert torch.equal(batch.images, images[batch.indices].float() / 127.5 - 1)
    assert batch.labels is not None
    assert torch.equal(batch.labels, batch.indices % 3)
    assert dataset.revision == "as-is"
    assert dataset.to("cpu") is dataset


def test_reference_images_are_the_file_itself(dataset: PreparedDataset) -> None:
    # Views of the memory map: no copy is made on the way.
    start = torch.from_numpy(dataset.store.images).data_ptr()
    pointers = [b.data_ptr() - start for b in dataset.reference_images(10)]
    assert pointers == [192 * first for first in range(0, 50, 10)]


def test_what_was_prepared_must_fit_the_spec(
    dataset: PreparedDataset, spec: DatasetSpec, locations: DataLocations
) -> None:
    with pytest.raises(UserError, match=r"holds images \(3, 8, 8\) of 3 classes; allowed: .*of 4"):
        build(spec._replace(num_classes=4), locations)


def test_an_interrupted_preparation_is_named(locations: DataLocations) -> None:
    (locations.data_dir / "cifar10.partial").mkdir(parents=True)
    with pytest.raises(MissingError, match=r"is not completely prepared in .*--source PATH"):
        build(SPECS["cifar10"], locations)


# ---- reading ahead -----------------------------------------------------------------------------


def test_read_ahead_gives_what_reading_gives(dataset: PreparedDataset) -> None:
    ahead = ReadAhead(dataset._read, CPU)
    for start in (0, 8, 16, 40, 48, 8):  # jumps included
        images, flips, indices, labels = ahead.fetch(Key(start, 8, 3))
        want = dataset.batch(start, 8, 3)
        assert torch.equal(images.float() / 127.5 - 1, want.images)
        assert torch.equal(indices, want.indices)
        assert want.labels is not None
        assert torch.equal(labels, want.labels)
        assert flips.shape == (8,)
    ahead.close()


def test_the_next_batch_is_read_before_it_is_asked_for() -> None:
    read: list[Key] = []
    seen = threading.Event()

    def slow_source(key: Key) -> tuple[torch.Tensor, ...]:
        read.append(key)
        if len(read) == 3:
            seen.set()
        return (torch.zeros(1),)

    ahead = ReadAhead(slow_source, CPU)
    ahead.fetch(Key(0, 4, 0))
    ahead.fetch(Key(16, 4, 0))  # a stride of 16: four processes
    assert seen.wait(10)
    ahead.fetch(Key(32, 4, 0))
    ahead.close()
    assert Key(32, 4, 0) in read
    assert read.count(Key(32, 4, 0)) == 1


def test_announced_batches_are_bounded_and_errors_reach_the_caller() -> None:
    go = threading.Event()

    def blocked(key: Key) -> tuple[torch.Tensor, ...]:
        go.wait(10)
        if key.start == 99:
            raise OSError("the disk is gone")
        return (torch.tensor(key.start),)

    ahead = ReadAhead(blocked, CPU)
    for start in range(10):
        ahead.announce(Key(start, 1, 0))
    assert len(ahead._waiting) == DEPTH
    go.set()
    assert ahead.fetch(Key(2, 1, 0))[0] == 2  # forgotten, so read again
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.fetch(Key(99, 1, 0))
    ahead.close()


@pytest.mark.cuda
@pytest.mark.parametrize("resident", [True, False])
def test_batches_on_the_gpu_equal_those_on_the_cpu(
    dataset: PreparedDataset, resident: bool
) -> None:
    moved = dataset.to("cuda", resident=resident)
    for start in (0, 16, 32, 48, 64):
        here, there = dataset.batch(start, 16, 3, xflip=True), moved.batch(start, 16, 3, xflip=True)
        assert there.images.is_cuda
        assert torch.equal(here.images, there.images.cpu())
        assert here.labels is not None
        assert there.labels is not None
        assert torch.equal(here.labels, there.labels.cpu())


# ---- latents -----------------------------------------------------------------------------------


@pytest.fixture
def latent_dataset(tmp_path: Path, locations: DataLocations) -> latents.LatentDataset:
    source = tmp_path / "latents"
    source.mkdir()
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(5, 4, 64, 64)) * np.reshape(latents.RAW_STD, (4, 1, 1))
    mean += np.reshape(latents.RAW_MEAN, (4, 1, 1))
    std = np.full_like(mean, 1e-3)
    for i in range(5):
        np.save(source / f"img{i:08d}.npy", np.concatenate([mean[i], std[i]]).astype(np.float32))
    names = [[f"img{i:08d}.npy", i] for i in range(5)]
    (source / "dataset.json").write_text(json.dumps({"labels": names}))
    prepare(SPECS["imagenet512"], RULES["imagenet512"], Request(source, subset=True), locations)
    spec = SPECS["imagenet512"]
    dataset = load_dataset(spec, load_object(spec.factory), locations)
    assert isinstance(dataset, latents.LatentDataset)
    return dataset


def test_latents_are_sampled_and_standardised(latent_dataset: latents.LatentDataset) -> None:
    batch = latent_dataset.batch(0, 5, seed=1)
    assert batch.images.shape == (5, 4, 64, 64)
    assert batch.images.dtype == torch.float32
    assert batch.images.std((0, 2, 3)).tolist() == pytest.approx([0.5] * 4, rel=0.02)
    assert batch.images.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * 4, abs=0.02)
    stored = torch.from_numpy(latent_dataset.store.images)[batch.indices]
    noise = (latents.unstandardise(batch.images) - stored[:, :4]) / stored[:, 4:]
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    one_by_one = [latent_dataset.batch(k, 1, seed=1).images for k in range(5)]
    assert torch.equal(batch.images, torch.cat(one_by_one))
    other = latent_dataset.batch(5, 5, seed=1)  # the next epoch draws other noise
    again = other.images[torch.argsort(other.indices)]
    assert not torch.equal(batch.images[torch.argsort(batch.indices)], again)


def test_latents_say_what_they_cannot_do(latent_dataset: latents.LatentDataset) -> None:
    with pytest.raises(MissingError, match=r"statistics of the original 512x512 images"):
        next(latent_dataset.reference_images())
    with pytest.raises(ValueError, match="latents cannot be mirrored"):
        latent_dataset.batch(0, 1, 0, xflip=True)
    with pytest.raises(MissingError, match=r"decoding its latents needs"):
        latent_dataset.to_pixels(torch.zeros(1, 4, 64, 64))


def test_pictures_are_their_own_pixels(dataset: PreparedDataset) -> None:
    images = torch.zeros(1, 3, 8, 8)
    assert dataset.to_pixels(images) is images


# ---- a user's own data -------------------------------------------------------------------------


def test_a_folder_of_ones_own(tmp_path: Path, locations: DataLocations) -> None:
    class_folder(tmp_path / "my photos", pictures(9, 16))
    name = f"folder:{tmp_path}/my photos"
    with pytest.raises(MissingError, match=r"is not prepared in .*run `cmbench prepare folder:"):
        resolve_dataset(name, SPECS, locations)
    spec, rule = custom_target(slug(name), tmp_path / "my photos", "", None, "")
    assert (spec.data_shape, spec.num_classes) == ((3, 16, 16), 3)
    prepare(spec, rule, Request(tmp_path / "my photos"), locations)
    found = resolve_dataset(name, SPECS, locations)
    assert found == spec
    assert found.name.startswith("folder-my-photos-")
    assert resolve_dataset(spec.name, SPECS, locations) == spec
    assert load_dataset(found, load_object(found.factory), locations).size == 9


def test_a_crop_is_needed_where_pictures_are_not_square(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encode(pictures(1, 16)[0, :, :12]))
    message = r"first image, '0.png', is 12x16; allowed: square images; add --transform \(adm"
    with pytest.raises(UserError, match=message):
        custom_target("mine", tmp_path, "", None, "")
    spec, rule = custom_target("mine", tmp_path, "adm-crop", 8, "")
    assert (spec.data_shape, rule.transform) == ((3, 8, 8), "adm-crop")


def test_grey_pictures_and_numbers_without_names(tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(4, channels=1), [0, 5, 2, 0])
    spec, _ = custom_target("mine", path, "", None, "")
    assert (spec.data_shape, spec.num_classes) == ((1, 8, 8), 6)
    for label in (-1, 10**8):
        path = edm_zip(tmp_path / "b.zip", pictures(2), [0, label])
        message = rf"label {label} of image .*1.png' is out of range; allowed: 0 … 99,999; number"
        with pytest.raises(UserError, match=message):
            custom_target("mine", path, "", None, "")


def test_an_unknown_dataset_lists_what_there_is(
    dataset: PreparedDataset, locations: DataLocations
) -> None:
    assert resolve_dataset("digits", SPECS, locations) is SPECS["digits"]
    with pytest.raises(UserError, match=r"dataset 'cifra10'; .*tiny; did you mean 'cifar10'"):
        resolve_dataset("cifra10", SPECS, locations)


def test_a_first_image_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"image '0.png' cannot be decoded"):
        custom_target("mine", tmp_path, "", None, "")
