from __future__ import annotations

import pytest
import torch

from cmbench.errors import UserError
from cmbench.metrics import memorisation as module
from cmbench.metrics.census import Census, CensusTaker
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


# ---- copies -------------------------------------------------------------------------------------


def wide(count: int, seed: int, dimensions: int = 24) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)) + 50


@pytest.mark.parametrize("block", [37, 4096])
def test_near_copies_are_counted(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    real = wide(300, 1)
    samples = torch.cat([wide(100, 0), real[:40] + 1e-2])
    found = module.feature_copies(samples, torch.cat([real, real[:7] - 1e-2]))
    assert (found.samples, found.held_out, found.held_out_copies) == (140, 307, 14)
    # The copies of the seven that are in the data twice have two neighbours equally near.
    assert found.copies == 33
    assert found.significant


def test_typical_samples_are_no_copies() -> None:
    """Samples that are nearer to the data than data are to each other, but to no single image."""
    real = wide(500, 1)
    middle = real.mean(0) + 0.1 * (wide(500, 0) - 50)
    for samples in (middle, wide(500, 2)):
        found = module.feature_copies(samples, real)
        assert found.copies == 0
        assert not found.significant


def test_only_so_many_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXAMINED", 50)
    real = wide(200, 1)
    found = module.feature_copies(torch.cat([wide(50, 0), real]), real)
    assert (found.samples, found.copies, found.held_out) == (50, 0, 50)


def census(images: torch.Tensor) -> Census:
    taker = CensusTaker()
    taker.update(images)
    return taker.result()


def test_exact_copies_are_counted_with_those_among_the_real_images() -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8, generator=random)
    real[50:] = real[:10]  # ten pairs
    fresh = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8, generator=random)
    found = module.find_copies(census(torch.cat([fresh, real[:25]])), census(real), None, None)
    assert found.keys() == {"pixels"}
    assert found["pixels"].model_dump() == {
        "samples": 55,
        "copies": 25,
        "held_out": 60,
        "held_out_copies": 20,
    }
    assert module.copy_warnings(found) == []
    cheat = module.find_copies(census(real[:50]), census(real), wide(5, 0), wide(9, 1))
    assert module.copy_warnings(cheat) == [
        "50 of 50 samples are exact copies of real images, where 20 of 60 held-out real images "
        "are: never ranked"
    ]


def test_copies_are_not_asked_for_in_few_dimensions_or_of_other_sizes() -> None:
    random = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (9, 1, 2, 2), dtype=torch.uint8, generator=random)
    large = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8, generator=random)
    few = wide(9, 0, 15)
    assert module.find_copies(census(small), census(large), few, few) == {}
    assert module.find_copies(census(small), None, wide(9, 0), None) == {}
    assert module.find_copies(census(small), None, wide(9, 0), wide(9, 1)).keys() == {"features"}
