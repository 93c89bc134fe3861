"""Published values, where real weights and data are at hand; skipped with a reason elsewhere.

``CMBENCH_WEIGHTS``           the published weights (or the libraries' own caches)
``CMBENCH_DATA``              with ``cmbench prepare cifar10`` done
``CMBENCH_TEST_CIFAR10_5000`` ``train`` and ``valid``: 5,000 PNG each, as torch-fidelity dumps them
``CMBENCH_TEST_OPENAI``       OpenAI's reference and sample batches (``.npz``)
``CMBENCH_TEST_REFERENCES``   EDM's ``cifar10-32x32.npz``, clean-fid's
                              ``cifar10_legacy_tensorflow_train_32.npz``
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_subsets import kernel_distance_of_subsets
from torch import Tensor

from cmbench.data.base import Dataset, load_dataset
from cmbench.data.locations import DataLocations
from cmbench.errors import MissingError
from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.inception import InceptionExtractor
from cmbench.metrics.inception_score import inception_score
from cmbench.metrics.weight_files import find_weights
from cmbench.plugin.manager import load_plugins
from cmbench.samples.opening import open_samples

# Tests see none of the developer's variables, so they are read when this file is.
FOLDERS = {
    name: Path(os.environ[f"CMBENCH_{name}"])
    for name in ("DATA", "TEST_CIFAR10_5000", "TEST_OPENAI", "TEST_REFERENCES")
    if os.environ.get(f"CMBENCH_{name}")
}
pytestmark = pytest.mark.timeout(24 * 3600)
Cmbench = Callable[..., Any]


def located(name: str) -> Path | str:
    """Return the path of published weights, or why there is none."""
    try:
        return find_weights(name)
    except MissingError as error:
        return str(error)


WEIGHTS = {name: located(name) for name in ("inception", "clean-fid")}


def weights(name: str) -> Path:
    found = WEIGHTS[name]
    if isinstance(found, str):
        pytest.skip(f"needs the published weights: {found}")
    return found


def folder(name: str, *files: str) -> Path:
    if name not in FOLDERS:
        pytest.skip(f"needs published data: set CMBENCH_{name} (see the top of this file)")
    for file in files:
        if not (FOLDERS[name] / file).exists():
            pytest.skip(f"needs {file} in CMBENCH_{name}={FOLDERS[name]}")
    return FOLDERS[name]


@pytest.fixture(scope="module")
def cifar10() -> Dataset:
    """The training images in the order of CIFAR-10's batches."""
    plugins = load_plugins()
    try:
        return load_dataset(
            plugins.datasets.get("cifar10"),
            plugins.datasets.load("cifar10"),
            DataLocations(folder("DATA")),
        )
    except MissingError as error:
        pytest.skip(f"needs CIFAR-10: {error}")


def extracted(source: Path, extractor: InceptionExtractor) -> tuple[Tensor, Tensor]:
    found = [extractor(batch.images) for batch in open_samples(str(source)).batches(250)]
    return torch.cat([f.pool for f in found]), torch.cat([f.logits for f in found])  # type: ignore[misc]


def test_inception_score_of_cifar10(cifar10: Dataset) -> None:
    """torch-fidelity's README: 11.23678 +- 0.09514061."""
    extractor = InceptionExtractor(weights("inception"))
    logits = [extractor(images).logits for images in cifar10.reference_images(250)]
    score = inception_score(torch.cat(logits))  # type: ignore[arg-type]
    assert score.mean == pytest.approx(11.23678, abs=1e-3)
    assert score.std == pytest.approx(0.09514061, abs=1e-3)


def test_cifar10_train_against_valid_5000(cmbench: Cmbench) -> None:
    """torch-fidelity's own tests: FID 10.3233274, ISC 10.75051 / 0.5778723, KID of subsets."""
    path, found = folder("TEST_CIFAR10_5000", "train", "valid"), weights("inception")
    scored = cmbench(
        "eval",
        str(path / "train"),
        "--reference",
        str(path / "valid"),
        "--metrics",
        "fid,is",
        "--weights",
        str(found),
        "--no-record",
        "--json",
        "-q",
    )
    assert scored.code == 0, scored.err
    metrics = json.loads(scored.out)["metrics"]
    assert metrics["fid"]["value"] == pytest.approx(10.3233274, abs=1e-3)
    assert metrics["is"]["value"] == pytest.approx(10.75051, abs=1e-3)
    assert metrics["is"]["detail"]["std"] == pytest.approx(0.5778723, abs=1e-3)
    extractor = InceptionExtractor(found)
    train, valid = (extracted(path / name, extractor)[0] for name in ("train", "valid"))
    mean, spread = kernel_distance_of_subsets(train, valid, subsets=100, subset_size=1000)
    assert mean == pytest.approx(-2.907863e-05, abs=1e-6)
    assert spread == pytest.approx(1.023118e-4, abs=1e-6)


#: Sample batch, reference batch, metric, value, tolerance: a PyTorch port is 8e-4 from TensorFlow.
OPENAI = [
    ("admnet_imagenet64.npz", "VIRTUAL_imagenet64_labeled.npz", "fid", 2.6141597, 5e-3),
    *(
        ("admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz", *rest)
        for rest in (
            ("fid", 3.94256, 5e-3),
            ("sfid", 6.14043, 2e-2),
            ("precision", 0.8265, 6e-3),
            ("recall", 0.5309, 6e-3),
        )
    ),
]


@pytest.mark.parametrize(("samples", "reference", "metric", "value", "tolerance"), OPENAI)
def test_openais_evaluations(
    cmbench: Cmbench, samples: str, reference: str, metric: str, value: float, tolerance: float
) -> None:
    """guided-diffusion's README and issue 75; its squared distances are float16 (+0.004)."""
    path = folder("TEST_OPENAI", samples, reference)
    found = cmbench(
        "eval",
        str(path / samples),
        "--reference",
        str(path / reference),
        "--metrics",
        metric,
        "--weights",
        str(weights("inception")),
        "--no-record",
        "--json",
        "-q",
    )
    assert found.code == 0, found.err
    assert json.loads(found.out)["metrics"][metric]["value"] == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize("file", ["cifar10-32x32.npz", "cifar10_legacy_tensorflow_train_32.npz"])
def test_published_statistics_of_cifar10_are_ours(cifar10: Dataset, file: str) -> None:
    """The distance between our statistics of the training images and the published ones is 0."""
    from cmbench.metrics.clean_fid import legacy_tensorflow
    from cmbench.metrics.reference_cache import cached_reference
    from cmbench.metrics.reference_import import import_reference

    published = import_reference(folder("TEST_REFERENCES", file) / file)
    ours = cached_reference(
        lambda: cifar10.reference_images(250),
        legacy_tensorflow(weights("clean-fid")),
        source="cifar10",
        source_sha256=cifar10.sha256,
        quantization="round",
        folder=None,
    )
    assert frechet_distance(ours.moments, published.moments) == pytest.approx(0, abs=1e-3)
