"""Whole evaluations: our pipeline against the libraries' on the same files and weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_kit import metrics
from PIL import Image
from torch import Tensor

from cmbench.errors import UserError
from cmbench.measure.extractors import plan_metrics
from cmbench.measure.loop import measure, sample_count_warnings
from cmbench.measure.observers import PixelDigest
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.inception import InceptionExtractor
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import cached_reference
from cmbench.metrics.shipped_cnn import DigitsExtractor
from cmbench.metrics.suite import MetricSuite
from cmbench.plugin.manager import PluginManager
from cmbench.samples.opening import open_samples
from cmbench.samples.source import ReadOptions

#: Images for the 64-feature layer, and for the 2048-feature one, which costs 0.2 s an image.
COUNT, FEW = 72, 14


def pictures(count: int, seed: int, contrast: float = 1.0, size: int = 20) -> np.ndarray[Any, Any]:
    """Return smooth colour images with some noise, lively enough for random features."""
    random = np.random.RandomState(seed)
    coarse = random.rand(count, 4, 4, 3)
    smooth = coarse.repeat(size // 4, 1).repeat(size // 4, 2)
    noisy = smooth * contrast + 0.15 * random.randn(count, size, size, 3)
    return (noisy.clip(0, 1) * 255).astype(np.uint8)


def write_png(folder: Path, images: np.ndarray[Any, Any]) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Samples and real images as PNG files."""
    return write_folders(tmp_path_factory.mktemp("folders"), COUNT)


def write_folders(root: Path, count: int) -> tuple[Path, Path]:
    samples = write_png(root / "samples", pictures(count, 0, 0.8))
    return samples, write_png(root / "real", pictures(count, 1))


def reference_of(folder: Path, extractor: Extractor) -> Reference:
    def images() -> Iterator[Tensor]:
        for batch in open_samples(str(folder)).batches(50):
            yield batch.images

    return cached_reference(
        images,
        extractor,
        source=folder.name,
        source_sha256=folder.name,
        quantization="round",
        folder=None,
    )


def library_metrics(
    folders: tuple[Path, Path], weights: Path, layer: str, count: int
) -> dict[str, float]:
    """Everything that torch-fidelity says of the same files with the same weights."""
    import torch_fidelity

    return dict(
        torch_fidelity.calculate_metrics(
            input1=str(folders[0]),
            input2=str(folders[1]),
            cuda=False,
            isc=layer == "2048",
            fid=True,
            kid=True,
            prc=True,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(weights),
            feature_layer_fid=layer,
            feature_layer_kid=layer,
            feature_layer_prc=layer,
            kid_subsets=1,
            kid_subset_size=count,
            verbose=False,
            cache=False,
            save_cpu_ram=True,
            batch_size=48,
        )
    )


def library_kernel(samples: Tensor, reference: Reference | None) -> float:
    """torch-fidelity's kernel distance of all the features, in float64."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    assert reference is not None
    assert reference.features is not None
    found = kid_features_to_metric(
        samples.double(),
        reference.features.double(),
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        kid_subsets=1,
        kid_subset_size=len(samples),
        rng_seed=2020,
        verbose=False,
    )
    return float(found["kernel_inception_distance_mean"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parity_with_torch_fidelity_at_full_rank(
    folders: tuple[Path, Path], inception_weights: Path
) -> None:
    """72 images and 64 features: the covariance has full rank, and the library is exact there."""
    extractor = InceptionExtractor(inception_weights, layer="64", implementation="library")
    suite = MetricSuite(
        metrics("fd-inception-64-unverified", "kd", "precision", "recall", extractor=extractor),
        extractor=extractor,
        reference=reference_of(folders[1], extractor),
    )
    found = measure(open_samples(str(folders[0])), [suite], batch_size=48).metrics
    theirs = library_metrics(folders, inception_weights, "64", COUNT)
    pairs = {
        "fd-inception-64-unverified": "frechet_inception_distance",
        "precision": "precision",
        "recall": "recall",
    }
    for ours, name in pairs.items():
        assert found[ours].value == pytest.approx(theirs[name], rel=1e-6, abs=1e-9), ours
    # The library takes its kernels in float32; its own function agrees once it is given float64.
    kernel = found["kd"].value
    assert kernel == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert suite.samples.pool is not None
    in_float64 = library_kernel(suite.samples.pool, suite.reference)
    assert kernel == pytest.approx(in_float64, rel=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parity_at_2048_features_to_the_librarys_own_rounding(
    tmp_path: Path, inception_weights: Path
) -> None:
    folders = write_folders(tmp_path, FEW)
    extractor = InceptionExtractor(inception_weights)
    reference = reference_of(folders[1], extractor)
    suite = MetricSuite(
        metrics("fd-inception-unverified", "is", "kd", "precision", "recall"),
        extractor=extractor,
        reference=reference,
    )
    evaluation = measure(open_samples(str(folders[0])), [suite], batch_size=48)
    found = {name: metric.value for name, metric in evaluation.metrics.items()}
    theirs = library_metrics(folders, inception_weights, "2048", FEW)
    assert found["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert found["kd"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert found["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(theirs["recall"], abs=1e-6)

    # The exact value by another route: the nuclear norm of the small product of centred rows.
    samples, real = suite.samples.pool, reference.features
    assert samples is not None
    assert real is not None
    x, y = samples.double() - samples.double().mean(0), real.double() - real.double().mean(0)
    root = torch.linalg.svdvals(x @ y.T).sum() / (FEW - 1)
    delta = samples.double().mean(0) - real.double().mean(0)
    exact = float(delta @ delta + (x.square().sum() + y.square().sum()) / (FEW - 1) - 2 * root)
    distance = found["fd-inception-unverified"]
    assert distance == pytest.approx(exact, rel=1e-10)
    library_error = abs(theirs["frechet_inception_distance"] - exact)
    assert abs(distance - exact) < 1e-3 * library_error, "the difference is the library's rounding"
    assert theirs["frechet_inception_distance"] == pytest.approx(exact, rel=1e-2)
    detail = evaluation.metrics["fd-inception-unverified"].detail
    assert detail["rank_deficient"] is True


def test_one_pass_feeds_every_suite_and_says_what_was_odd(tmp_path: Path) -> None:
    digits = DigitsExtractor()
    real = torch.randint(0, 256, (80, 1, 8, 8), dtype=torch.uint8)
    reference = cached_reference(
        lambda: [real], digits, source="r", source_sha256="r", quantization="round", folder=None
    )
    images = torch.randint(0, 256, (70, 8, 8, 1), dtype=torch.uint8).numpy()
    images[1] = images[0]
    np.savez(tmp_path / "s.npz", images, np.arange(70) % 5)
    suites = [
        MetricSuite(metrics(metric), extractor=digits, reference=reference, class_counts=[10] * 10)
        for metric in ("fd-digits", "precision")
    ]
    source = open_samples(str(tmp_path / "s.npz"), ReadOptions(channels=1))
    seen: list[int] = []
    digest = PixelDigest()
    found = measure(
        source,
        suites,
        batch_size=32,
        observers=[digest, lambda batch: seen.append(batch.first + len(batch.images))],
    )
    assert set(found.metrics) == {"fd-digits", "precision"}
    assert seen == [32, 64, 70]
    assert found.count == 70
    assert found.shape == (1, 8, 8)
    assert found.class_counts == dict.fromkeys(range(5), 14)
    warnings = "\n".join(found.warnings)
    assert "1 of 70 samples are duplicates" in warnings
    assert len(found.warnings) == len(set(found.warnings)), "each is said once"
    again, whole = PixelDigest(), open_samples(str(tmp_path / "s.npz"), ReadOptions(channels=1))
    measure(whole, [], batch_size=9, observers=[again])
    assert again.sha256 == digest.sha256, "the samples' hash does not depend on batches"


def test_samples_of_another_size_are_refused(tmp_path: Path) -> None:
    pixels = tmp_path / "s.npy"
    np.save(pixels, np.zeros((4, 9, 9, 1), np.uint8))
    digits = DigitsExtractor()
    reference = cached_reference(
        lambda: [torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)],
        digits,
        source="r",
        source_sha256="r",
        quantization="round",
        folder=None,
    )
    suite = MetricSuite(metrics("fd-digits"), extractor=digits, reference=reference)
    with pytest.raises(UserError, match=r"images of 1x9x9, the reference's are 1x8x8"):
        measure(open_samples(str(pixels), ReadOptions(channels=1)), [suite], batch_size=4)


class TestPlan:
    def test_each_metric_goes_to_its_extractor(self, plugins: PluginManager) -> None:
        asked = ("fid", "is", "pr", "kid", "fid-clean", "fd-dinov2")
        plan = plan_metrics(asked, "inception", plugins)
        assert plan == {
            "inception": ["fid", "is", "precision", "recall", "kid"],
            "inception-clean": ["fid-clean"],
            "dinov2": ["fd-dinov2"],
        }
        assert plan_metrics(("fd-digits", "prdc"), "digits-cnn", plugins) == {
            "digits-cnn": ["fd-digits", "precision", "recall", "density", "coverage"]
        }

    def test_mistakes_are_named(self, plugins: PluginManager) -> None:
        with pytest.raises(UserError, match="unknown metric 'fod'"):
            plan_metrics(("fod",), "inception", plugins)
        with pytest.raises(UserError, match="no metric; allowed: fid"):
            plan_metrics((), "inception", plugins)
        with pytest.raises(UserError, match="have no noise to compare with"):
            plan_metrics(("flow-map-mean",), "pixels", plugins)


def test_protocol_count() -> None:
    assert sample_count_warnings(50_000, 50_000) == []
    (warning,) = sample_count_warnings(10_000, 50_000)
    assert "10000 samples instead of the protocol's 50000" in warning
