from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cmbench.errors import MissingError, UserError
from cmbench.metrics.extractor import Extractor, PixelExtractor
from cmbench.metrics.shipped_cnn import SHIPPED, CifarExtractor, DigitsExtractor

WEIGHTS = SHIPPED / "digits-cnn.safetensors"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_digits_extractor.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits_extractor", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    found: dict[str, object] = json.loads(WEIGHTS.with_suffix(".json").read_text("utf-8"))
    return found


def test_recorded_numbers_are_those_of_the_shipped_weights(
    script: ModuleType, facts: dict[str, object]
) -> None:
    images, labels = script.load_images()
    _, held_out = script.split(labels)
    measured = script.measure(images, labels, held_out)
    for name, value in measured.items():
        assert facts[name] == pytest.approx(value, rel=1e-4), name


def test_the_distance_means_something(facts: dict[str, object]) -> None:
    assert facts["held_out_accuracy"] >= 0.97
    assert facts["covariance_rank"] == DigitsExtractor.feature_dim
    for noise in ("uniform_noise", "gaussian_noise"):
        assert facts[noise] > 50 * facts["floor_real_halves"]


def test_a_short_training_is_deterministic(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "EPOCHS", 1)
    images, labels = script.load_images()
    images, labels = images[:256].float() / 127.5 - 1, labels[:256]
    first = script.train_network(images, labels).state_dict()
    second = script.train_network(images, labels).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = script.DigitsNetwork().state_dict()
    assert not torch.equal(first["output.weight"], untrained["output.weight"])


def test_extractors_keep_the_protocol() -> None:
    digits = DigitsExtractor()
    assert isinstance(digits, Extractor)
    assert isinstance(CifarExtractor(), Extractor)
    assert isinstance(PixelExtractor(), Extractor)
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    features = digits(images)
    assert features.pool.shape == (5, 64)
    assert features.logits is not None
    assert features.logits.shape == (5, 10)
    floats = digits(images.float() / 127.5 - 1)
    torch.testing.assert_close(floats.pool, features.pool, rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_the_batch() -> None:
    extractor = DigitsExtractor()
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    whole = extractor(images).pool
    parts = torch.cat([extractor(part).pool for part in images.split(7)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    path = Path(shutil.copy(WEIGHTS, tmp_path))
    with pytest.raises(MissingError, match=r"no file .*digits-cnn\.json"):
        DigitsExtractor(path)
    shutil.copy(WEIGHTS.with_suffix(".json"), tmp_path)
    assert DigitsExtractor(path).weights_sha256 == DigitsExtractor().weights_sha256
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is not the recorded one.*reinstall"):
        DigitsExtractor(path)


def test_other_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(2, 3, 32, 32\); allowed: \[N, 1, 8, 8\]"):
        DigitsExtractor()(torch.zeros(2, 3, 32, 32))
    with pytest.raises(UserError, match=r"cifar-cnn .*; allowed: \[N, 3, 32, 32\]; choose"):
        CifarExtractor()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(UserError, match=r"\(2, 64\); allowed: \[N, C, H, W\]"):
        PixelExtractor()(torch.zeros(2, 64))
