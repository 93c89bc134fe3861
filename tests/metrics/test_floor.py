"""The floor and the ceilings: what a perfect generator scores, checked against perfect ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from metric_kit import metrics
from torch import Tensor

from cmbench.files import sealed
from cmbench.metrics import precision_recall as blocks
from cmbench.metrics._files import read_tensors, write_tensors
from cmbench.metrics.extractor import PixelExtractor
from cmbench.metrics.floor import Floors, Share
from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.precision_recall import (
    knn_radii,
    precision_recall,
    reference_radii,
    share_inside_others,
)
from cmbench.metrics.real_splits import measure_floors
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import cached_reference, load_reference
from cmbench.metrics.statistics import moments_of
from cmbench.metrics.suite import MetricSuite

DIM, REAL, MADE = 6, 500, 350


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def floor() -> Floors:
    real = rows(REAL, 0)
    return measure_floors(real, reference_radii(real))


def reference_of(points: Tensor, folder: Path | None = None) -> Reference:
    return cached_reference(
        lambda: [points[:, :, None, None]],
        PixelExtractor(),
        source="points",
        source_sha256="0" * 64,
        quantization="none",
        folder=folder,
    )


def test_the_distance_of_a_perfect_generator(floor: Floors) -> None:
    """60 repetitions know the mean to 3 %, splits of one set to 5 %: within 20 %."""
    values = torch.tensor(
        [
            frechet_distance(moments_of(rows(MADE, 2 * i + 1)), moments_of(rows(REAL, 2 * i + 2)))
            for i in range(60)
        ]
    )
    found = floor.of_distance(MADE, REAL)
    assert found["value"] == pytest.approx(float(values.mean()), rel=0.2)
    assert found["std"] == pytest.approx(float(values.std()), rel=0.5)
    assert found["value"] < 0.75 * floor.distance, "halves alone would be too pessimistic"
    assert (found["samples"], found["reference_samples"], found["splits"]) == (MADE, REAL, 100)


@pytest.mark.parametrize("made", [60, 200, 350, 900])
def test_the_shares_of_a_perfect_generator(floor: Floors, made: int) -> None:
    """Precision, recall, density, coverage at counts around and between those of the splits."""
    found: dict[str, list[float]] = {}
    for i in range(40):
        scores = precision_recall(rows(made, 3 * i + 1), rows(REAL, 3 * i + 2))
        for name in ("precision", "recall", "density", "coverage"):
            found.setdefault(name, []).append(getattr(scores, name))
    for name, values in found.items():
        ceiling = floor.of_share(name, made, REAL, 3)
        spread = float(torch.tensor(values).std())
        mean = sum(values) / len(values)
        # One set's ceiling is off by about one standard deviation of the score at its own count.
        assert abs(ceiling["value"] - mean) < 2.5 * max(spread, ceiling["std"] or 0), name
        assert ceiling["value"] <= 1


def test_a_ceiling_says_which_counts_it_is_for(floor: Floors) -> None:
    counts = [share.count for share in floor.inside]
    assert counts == [62, 125, 250, REAL - 1]

    def of(name: str, samples: int, reference: int) -> tuple[int, int]:
        found = floor.of_share(name, samples, reference, 3)
        return found["samples"], found["reference_samples"]

    assert of("precision", 2000, REAL) == (2000, REAL - 1), "one image is left out"
    assert of("recall", 2000, REAL) == (REAL - 1, REAL), "more the real images do not allow"
    assert of("recall", 180, REAL) == (180, REAL)
    assert of("recall", 20, REAL) == (62, REAL)
    assert of("coverage", 2000, REAL) == (2000, REAL)


def test_shares_between_two_counts_are_interpolated_in_their_logarithm() -> None:
    floor = Floors(20, 50, 1.0, 0.1, (Share(50, 0.8, 0.02, 20), Share(200, 0.6, 0.01, 20)))
    found = floor.of_share("recall", 100, 7, 3)
    assert (found["value"], found["std"]) == (pytest.approx(0.7), pytest.approx(0.015))
    assert floor.of_share("recall", 50, 7, 3)["value"] == 0.8
    assert floor.of_share("precision", 7, 200, 3)["value"] == 0.6


def test_unbiased_distances_have_none(floor: Floors) -> None:
    assert floor.of_unbiased(30, 40)["value"] == 0


@pytest.mark.parametrize("block", [4, 9, 64])
def test_leaving_each_out_is_what_it_says(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    points = rows(40, 5)
    inside = 0
    for i in range(40):
        others = torch.cat([points[:i], points[i + 1 :]])
        inside += bool(((others - points[i]).norm(dim=1) <= knn_radii(others).sqrt()).any())
    radii = reference_radii(points)
    assert share_inside_others(points, radii) == inside / 40


def test_few_real_images_have_no_floor() -> None:
    assert reference_of(rows(9, 0)).floors is None
    assert reference_of(rows(10, 0)).floors is not None


def test_every_metric_of_the_features_carries_it() -> None:
    reference = reference_of(rows(60, 0))
    names = ("fd-pixels", "sfd-pixels", "precision", "recall", "density", "coverage", "kd")
    spatial = replace(reference, spatial=reference.moments)
    suite = MetricSuite(
        metrics(*(n for n in names if n != "sfd-pixels")),
        extractor=PixelExtractor(),
        reference=spatial,
        quantization="none",
    )
    suite.update(rows(30, 1)[:, :, None, None])
    found = suite.finalize()
    for name, value in found.items():
        assert (value.detail["floor"]["samples"], value.higher_is_better) in {
            (30, name not in ("fd-pixels", "kd")),
            (59, True),
        }
    assert found["kd"].detail["floor"]["value"] == 0


def test_it_is_kept_in_the_reference_file(tmp_path: Path) -> None:
    points = rows(40, 0)
    fresh = reference_of(points, tmp_path)
    (path,) = tmp_path.iterdir()
    assert load_reference(path).floors == fresh.floors
    assert reference_of(points, tmp_path).floors == fresh.floors


@pytest.mark.parametrize("earlier", ["", json.dumps({"count": 20, "frechet": 1.0, "kernel": 0.0})])
def test_a_file_of_an_earlier_version_gets_one(tmp_path: Path, earlier: str) -> None:
    points = rows(40, 0)
    fresh = reference_of(points, tmp_path)
    (path,) = tmp_path.iterdir()
    tensors, metadata = read_tensors(path, "reference")
    write_tensors(path, tensors, sealed({**metadata, "floor": earlier}))
    assert load_reference(path).floors is None
    assert reference_of(points, tmp_path).floors == fresh.floors
    assert load_reference(path).floors == fresh.floors, "it was kept"
