from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from cmbench.data import digits
from cmbench.data.base import Dataset, load_dataset, quota_labels
from cmbench.data.catalog import CIFAR10_JPEG, DIGITS
from cmbench.data.locations import DataLocations
from cmbench.errors import MissingError, UserError
from cmbench.plugin.specs import load_object


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DIGITS, load_object(DIGITS.factory))


def test_it_is_what_scikit_learn_ships(dataset: Dataset) -> None:
    assert (dataset.size, dataset.data_shape, dataset.num_classes) == (1797, (1, 8, 8), 10)
    images = torch.cat(list(dataset.reference_images(100)))
    assert images.dtype == torch.uint8
    assert images.shape == (1797, 1, 8, 8)
    back = images[:, 0].numpy() * (16 / 255)
    assert np.abs(back - load_digits().images).max() < 0.5 * 16 / 255
    assert dataset.class_counts == tuple(np.bincount(load_digits().target))
    assert dataset.sha256 == digits.SHA256


def test_sigma_data_is_the_standard_deviation(dataset: Dataset) -> None:
    images = torch.cat(list(dataset.reference_images())).float() / 127.5 - 1
    assert dataset.sigma_data == pytest.approx(images.std().item(), abs=0.005)


def test_batches_are_the_images_in_the_order_of_the_stream(dataset: Dataset) -> None:
    images = torch.cat(list(dataset.reference_images()))
    batch = dataset.batch(1700, 300, seed=3)
    assert batch.labels is not None
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert torch.equal(batch.images, images[batch.indices].float() / 127.5 - 1)
    assert np.array_equal(batch.labels.numpy(), load_digits().target[batch.indices.numpy()])
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1


def test_mirroring_mirrors_about_half(dataset: Dataset) -> None:
    plain, mirrored = dataset.batch(0, 400, 5), dataset.batch(0, 400, 5, xflip=True)
    same = (plain.images == mirrored.images).flatten(1).all(1)
    turned = (plain.images.flip(3) == mirrored.images).flatten(1).all(1)
    assert (same | turned).all()
    assert 150 < int(turned.sum()) < 250


def test_a_batch_does_not_depend_on_its_size(dataset: Dataset) -> None:
    whole = dataset.batch(1790, 20, 7, xflip=True).images
    one_by_one = [dataset.batch(1790 + k, 1, 7, xflip=True).images for k in range(20)]
    assert torch.equal(whole, torch.cat(one_by_one))


def test_labels_for_sampling_follow_the_classes_and_their_seeds(dataset: Dataset) -> None:
    labels = dataset.labels_for(3000, seed=1)
    assert torch.equal(labels[1000:1100], dataset.labels_for(100, seed=1, start=1000))
    assert not torch.equal(labels, dataset.labels_for(3000, seed=2))
    counts = torch.bincount(labels, minlength=10)
    assert counts.min() > 230
    assert counts.max() < 370


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 300), st.integers(0, 99)
)
def test_quotas_are_exact(frequencies: list[int], total: int, seed: int) -> None:
    labels = quota_labels(frequencies, total, seed)
    counts = torch.bincount(labels, minlength=len(frequencies)).tolist()
    assert len(counts) == len(frequencies)
    assert sum(counts) == total
    for count, frequency in zip(counts, frequencies, strict=True):
        assert abs(count - total * frequency / sum(frequencies)) < 1
    assert torch.equal(labels, quota_labels(frequencies, total, seed))


def test_quotas_follow_the_classes_in_the_mean_and_are_shuffled(dataset: Dataset) -> None:
    labels = dataset.quota_labels(1797, seed=1)
    assert torch.bincount(labels).tolist() == list(dataset.class_counts)
    assert not torch.equal(labels, labels.sort().values)
    assert not torch.equal(labels, dataset.quota_labels(1797, seed=2))
    small = torch.stack(
        [torch.bincount(quota_labels([3, 1], 3, seed), minlength=2) for seed in range(200)]
    )
    assert small.double().mean(0).tolist() == pytest.approx([2.25, 0.75], abs=0.1)


def test_changed_data_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    with pytest.raises(MissingError, match=r"digits have changed.*reinstall scikit-learn"):
        digits.build(DIGITS, DataLocations())


def test_a_factory_that_returns_something_else_is_named() -> None:
    with pytest.raises(UserError, match=r"dataset 'digits': its factory .* returned int"):
        load_dataset(DIGITS, lambda spec, locations: 3)


def test_labels_of_a_dataset_without_labels_are_refused(dataset: Dataset) -> None:
    unlabelled = type(dataset)(
        CIFAR10_JPEG._replace(num_classes=0),
        np.zeros((4, 3, 32, 32), np.uint8),
        None,  # type: ignore[call-arg, arg-type]
        sha256="",
        revision="",  # type: ignore[call-arg]
    )
    with pytest.raises(UserError, match=r"has no labels.*conditional=false"):
        unlabelled.labels_for(3, 0)
    with pytest.raises(UserError, match=r"has no labels.*conditional=false"):
        unlabelled.quota_labels(3, 0)


def test_only_analytic_sets_have_an_exact_flow_map(dataset: Dataset) -> None:
    assert dataset.exact_flow_map(torch.zeros(2, 1, 8, 8)) is None


@pytest.mark.cuda
def test_batches_on_the_gpu_equal_those_on_the_cpu(dataset: Dataset) -> None:
    moved = dataset.to("cuda")
    for start in (0, 1790):
        here, there = dataset.batch(start, 64, 3, xflip=True), moved.batch(start, 64, 3, xflip=True)
        assert there.images.is_cuda
        assert torch.equal(here.images, there.images.cpu())
        assert here.labels is not None
        assert there.labels is not None
        assert torch.equal(here.labels, there.labels.cpu())


@pytest.mark.cuda
def test_a_batch_on_the_gpu_does_not_synchronise(dataset: Dataset) -> None:
    moved = dataset.to("cuda")
    moved.batch(0, 64, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved.batch(64, 64, 3, xflip=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
