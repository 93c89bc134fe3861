from __future__ import annotations

import pytest
import torch

from cmbench.errors import UserError
from cmbench.metrics import memorisation as module
from cmbench.metrics.memorisation import memorisation


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + 50


def test_fresh_samples_are_not_suspected() -> None:
    found = memorisation(rows(600, 0), rows(500, 1), rows(300, 2))
    assert abs(found.train_share - 0.5) < 4 * found.standard_error
    assert not found.suspicious
    assert found.compared == 300
    assert 0.9 < found.distance_ratio < 1.1


def test_copies_of_training_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 37)
    train = rows(400, 1)
    samples = torch.cat([rows(200, 0), train[:100] + 1e-3])
    found = memorisation(samples, train, rows(400, 2))
    assert found.suspicious
    assert found.train_share > 0.6
    for sample, image, distance in found.nearest:
        assert sample - 200 == image
        assert distance == pytest.approx(1e-3 * 6**0.5, rel=0.2)


def test_copies_of_held_out_images_are_not() -> None:
    other = rows(400, 2)
    found = memorisation(other[:200], rows(400, 1), other)
    assert found.train_share == 0
    assert not found.suspicious


def test_too_few_are_named() -> None:
    with pytest.raises(UserError, match="1 samples, 5 training and 5 held-out images"):
        memorisation(rows(1, 0), rows(5, 1), rows(5, 2))
