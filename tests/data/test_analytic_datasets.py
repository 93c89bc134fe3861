from __future__ import annotations

import pytest
import torch

from cmbench.data.analytic import BLOCK, AnalyticDataset
from cmbench.data.base import load_dataset
from cmbench.data.catalog import GMM, GMM_IMAGE
from cmbench.plugin.specs import DatasetSpec, load_object


def build(spec: DatasetSpec) -> AnalyticDataset:
    dataset = load_dataset(spec, load_object(spec.factory))
    assert isinstance(dataset, AnalyticDataset)
    return dataset


@pytest.mark.parametrize("spec", [GMM, GMM_IMAGE], ids=lambda s: s.name)
def test_batches_depend_on_seed_and_position_only(spec: DatasetSpec) -> None:
    dataset = build(spec)
    start = BLOCK - 10
    whole = dataset.batch(start, 20, 3)
    parts = [build(spec).batch(start + k, 5, 3) for k in range(0, 20, 5)]
    assert torch.equal(whole.images, torch.cat([p.images for p in parts]))
    assert whole.images.shape == (20, *spec.data_shape)
    assert whole.images.dtype == torch.float32
    assert not torch.equal(whole.images, dataset.batch(start, 20, 4).images)
    assert whole.labels is not None
    assert int(whole.labels.min()) >= 0
    assert int(whole.labels.max()) < spec.num_classes


@pytest.mark.parametrize("spec", [GMM, GMM_IMAGE], ids=lambda s: s.name)
def test_sigma_data_is_the_true_standard_deviation(spec: DatasetSpec) -> None:
    dataset = build(spec)
    images = torch.cat(list(dataset.reference_images())).double()
    assert len(images) == dataset.reference_count
    spread = (images - images.mean(0)).square().mean().sqrt()
    assert dataset.sigma_data == pytest.approx(spread.item(), rel=0.02)


def test_the_stream_never_repeats() -> None:
    dataset = build(GMM)
    images = dataset.batch(0, 3 * BLOCK, 0).images
    assert len(torch.unique(images.flatten(1), dim=0)) == 3 * BLOCK


def test_labels_name_the_components() -> None:
    dataset = build(GMM)
    batch = dataset.batch(0, 500, 1)
    assert batch.labels is not None
    nearest = torch.cdist(batch.images.flatten(1), dataset.mixture.means.float().flatten(1))
    assert (nearest.argmin(1) == batch.labels).float().mean() > 0.95
    assert len(set(dataset.class_counts)) == 1


def test_the_exact_flow_map_lands_on_the_data() -> None:
    dataset = build(GMM)
    noise = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    free = dataset.exact_flow_map(noise)
    assert free.dtype == noise.dtype
    radius = dataset.mixture.means.flatten(1).norm(dim=1)[0].item()
    assert ((free.flatten(1).norm(dim=1) - radius).abs() < 0.6).all()
    # Of one Gaussian it is known in closed form.
    mean, std = dataset.mixture.means[labels].float(), 0.1
    want = mean + (80 * noise - mean) * std / (std**2 + 80**2) ** 0.5
    given = dataset.exact_flow_map(noise, labels)
    assert torch.allclose(given, want, atol=1e-5)
    lower = dataset.exact_flow_map(noise, labels, sigma_max=10.0)
    want = mean + (10 * noise - mean) * std / (std**2 + 100) ** 0.5
    assert torch.allclose(lower, want, atol=1e-5)


def test_mirroring_is_refused() -> None:
    with pytest.raises(ValueError, match="no mirror symmetry"):
        build(GMM).batch(0, 4, 0, xflip=True)


def test_the_hash_tells_mixtures_apart() -> None:
    assert build(GMM).sha256 != build(GMM_IMAGE).sha256
    assert build(GMM).sha256 == build(GMM).sha256
