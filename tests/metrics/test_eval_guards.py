"""Guards that hold whatever the reference is: statistics alone, cached, or with a wrong count."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmbench.data.digits import read_digits
from cmbench.errors import UserError
from cmbench.measure.loop import measure
from cmbench.metrics.extractor import Features, PixelExtractor
from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.probe import placed
from cmbench.metrics.reference_cache import cached_reference, save_reference
from cmbench.metrics.reference_import import import_reference
from cmbench.metrics.shipped_cnn import DigitsExtractor
from cmbench.metrics.suite import MetricSuite
from cmbench.metrics.values import is_approximate
from cmbench.samples.generators import GeneratorSamples
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sampling.stream import SampleBatch
from cmbench.sweep.protocol import require_metrics
from cmbench.sweep.scored import score
from cmbench.sweep.scored_record import ScoreRequest
from cmbench.sweep.scored_reference import content_hash

pytestmark = pytest.mark.usefixtures("any_width")

Cmbench = Callable[..., Any]


def digits() -> np.ndarray[Any, Any]:
    return read_digits()[0].astype(np.uint8)


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    """Statistics of the digits without a census, as imported files are."""
    reference = cached_reference(
        lambda: [torch.from_numpy(digits())],
        DigitsExtractor(),
        source="digits-statistics",
        source_sha256="0",
        quantization="any",
        folder=None,
    )
    path = tmp_path / "statistics.safetensors"
    save_reference(replace(reference, census=None), path)
    return path


class TestStatisticsAlone:
    def score(self, cmbench: Cmbench, images: Any, statistics: Path, *more: str) -> Any:
        path = statistics.with_name("samples.npy")
        np.save(path, images)
        return cmbench(
            "eval",
            str(path),
            "--reference",
            str(statistics),
            "--extractor",
            "digits-cnn",
            "--metrics",
            "fd-digits",
            "--json",
            "-q",
            *more,
        )

    def test_unit_range_stored_as_bytes_speaks(self, cmbench: Cmbench, statistics: Path) -> None:
        binary = (digits() > 127).astype(np.uint8)
        for more in ((), ("-d", "digits")):
            found = self.score(cmbench, binary, statistics, *more)
            assert found.code == 0, found.err
            assert "all pixels of the samples lie in 0 … 1" in found.err
            assert ("no census of real images" in found.err) == (not more)

    def test_range_taken_for_another_speaks(self, cmbench: Cmbench, statistics: Path) -> None:
        found = self.score(cmbench, digits() // 2 + 128, statistics)
        assert "no pixel of the samples is below 128" in found.err

    def test_the_datasets_census_stands_in(
        self, cmbench: Cmbench, statistics: Path, workspace: Any
    ) -> None:
        alone = self.score(cmbench, digits()[:50], statistics)
        assert "equal a reference image" not in alone.err
        for _ in range(2):
            found = self.score(cmbench, digits()[:50], statistics, "-d", "digits")
            assert "50 of 50 samples equal a reference image" in found.err
            (kept,) = (workspace.cache / "census").glob("*.safetensors")
        kept.write_bytes(b"damaged")
        again = self.score(cmbench, digits()[:50], statistics, "-d", "digits")
        assert "50 of 50 samples equal a reference image" in again.err

    def test_the_datasets_size_is_required(self, cmbench: Cmbench, statistics: Path) -> None:
        large = digits().repeat(2, 2).repeat(2, 3)
        found = self.score(cmbench, large, statistics, "-d", "digits")
        assert found.code == 2
        assert "images of 1x16x16, the dataset's are 1x8x8" in found.err


class TestQuantizationOfBytes:
    def key(self, cmbench: Cmbench, images: Any, path: Path, *more: str) -> tuple[str, str]:
        np.save(path, images)
        found = cmbench(
            "eval",
            str(path),
            "-d",
            "digits",
            "--metrics",
            "fd-digits,precision",
            "--json",
            "--no-record",
            "-q",
            *more,
        )
        assert found.code == 0, found.err
        record = json.loads(found.out)
        keys = {name: metric["key"] for name, metric in record["metrics"].items()}
        assert keys["fd-digits"].split(":")[3] == keys["precision"].split(":")[3]
        return record["sampling"]["quantize"], keys["fd-digits"].split(":")[3]

    def test_the_key_claims_only_a_rule_that_was_applied_or_stated(
        self, cmbench: Cmbench, tmp_path: Path
    ) -> None:
        path, images = tmp_path / "s.npy", digits()[:60]
        assert self.key(cmbench, images, path) == ("stored", "stored")
        stated = self.key(cmbench, images, path, "--quantize", "round")
        assert stated == ("round", "round")
        floats = images.astype(np.float32) / 255
        assert self.key(cmbench, floats, path, "--range", "0,1") == ("round", "round")


class Spatial(PixelExtractor):
    """Pixels that double as spatial features where they are asked for."""

    def __init__(self, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial

    def __call__(self, images: Tensor) -> Features:
        found = super().__call__(images)
        return replace(found, spatial=found.pool) if self.spatial else found


def test_a_cached_reference_without_spatial_features_is_no_hit_for_theirs(tmp_path: Path) -> None:
    calls = []

    def images() -> list[Tensor]:
        calls.append(0)
        return [torch.from_numpy(digits()[:30])]

    def get(spatial: bool) -> Any:
        return cached_reference(
            images,
            Spatial(spatial),
            source="r",
            source_sha256="r",
            quantization="round",
            folder=tmp_path,
        )

    assert get(False).spatial is None
    assert get(True).spatial is not None
    assert get(True).spatial is not None
    assert get(False).notes == ()
    assert len(calls) == 2


class TestMidway:
    """The second batch is another kind of image than the first."""

    @pytest.mark.parametrize("change", [lambda x: x.repeat(1, 1, 2, 2), lambda x: x.float() / 255])
    def test_a_change_is_refused(self, change: Callable[[Tensor], Tensor]) -> None:
        images = torch.from_numpy(digits())

        def generate(indices: Tensor, seed: int) -> Tensor:
            found = images[indices]
            return change(found) if indices[0] >= 10 else found

        source = GeneratorSamples("g", generate, ReadOptions(channels=1, limit=20))
        with pytest.raises(UserError, match=r"from sample 10 on.*before.*one size and type"):
            list(source.batches(10))

        class Other(SampleSource):
            kind, count = "other", 20

            def batches(self, batch_size: int) -> Iterator[SampleBatch]:
                yield SampleBatch(images[:10], 0)
                yield SampleBatch(change(images[10:20]), 10)

        with pytest.raises(UserError, match=r"sample 10 has.*one size and type"):
            measure(Other("o", ReadOptions(channels=1)), [MetricSuite(())], batch_size=10)


class TestCount:
    def write(self, path: Path, count: int, dim: int = 6) -> Path:
        rows = np.random.RandomState(0).randn(count, dim)
        np.savez(path, mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
        return path

    def test_one_that_the_covariance_contradicts_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.npz", 50)
        with pytest.raises(UserError, match=r"count 3, but sigma has rank 6.*a count above 6"):
            import_reference(path, count=3)
        full = import_reference(path, count=50)
        assert frechet_distance(full.moments, full.moments) < 1e-12

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_a_true_one_is_taken(self, tmp_path: Path, dtype: Any) -> None:
        path = self.write(tmp_path / "a.npz", 20, 64)
        with np.load(path) as arrays:
            np.savez(path, **{name: arrays[name].astype(dtype) for name in arrays})
        few = import_reference(path, count=20)
        assert few.moments.factor.shape[1] == 19


def test_references_of_one_content_in_two_shapes_are_two() -> None:
    class Blank(SampleSource):
        kind, count = "blank", 6

        def batches(self, batch_size: int) -> Iterator[SampleBatch]:
            for part in torch.zeros(6, *self.shape, dtype=torch.uint8).split(batch_size):
                yield SampleBatch(part, 0)

    hashes = []
    for shape, batch_size in (((3, 4, 8), 6), ((3, 8, 4), 6), ((3, 4, 8), 4)):
        source = Blank("blank", ReadOptions())
        source.shape = shape
        hashes.append(content_hash(source, batch_size))
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2], "whatever the batches"


class Coarse(DigitsExtractor):
    """Digits features that lose what TF32 loses, anywhere but on the CPU."""

    bits = 0x1FFF

    def to(self, device: Any) -> Coarse:
        if torch.device(device).type != "cpu":
            for parameter in self.network.parameters():
                parameter.data = (parameter.data.view(torch.int32) & ~self.bits).view(torch.float32)
        return self


class TestPrecisionOfADevice:
    def test_any_extractor_is_compared_with_the_cpu(self) -> None:
        with pytest.raises(UserError, match=r"'digits-cnn' on meta.* differ from the CPU's by"):
            placed(Coarse(), "meta")
        assert placed(Coarse(), "cpu").name == "digits-cnn"
        exact = Coarse()
        exact.bits = 0
        assert placed(exact, "meta", (3, 9, 9)) is exact, "its own image shape comes first"

    def test_one_that_is_approximate_by_choice_is_not(self) -> None:
        extractor = Coarse()
        extractor.approximate = True
        assert placed(extractor, "meta") is extractor

    @pytest.mark.parametrize("shape", [(2, 1, 1), (1, 28, 28), ()])
    def test_data_of_any_shape(self, shape: tuple[int, ...]) -> None:
        assert placed(PixelExtractor(), "meta", shape).feature_dim > 0

    def test_evaluations_and_sweeps_do_it(
        self, context: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        registry = context.plugins.extractors
        monkeypatch.setattr(registry, "load", lambda name: lambda location: Coarse())
        context.device = torch.device("meta")
        with pytest.raises(UserError, match="differ from the CPU's"):
            require_metrics(context, "digits")
        np.save(tmp_path / "s.npy", digits()[:20])
        with pytest.raises(UserError, match="differ from the CPU's"):
            score(context, ScoreRequest(str(tmp_path / "s.npy"), dataset="digits"))


class TestApproximateExtractor:
    def test_its_key_and_deviation_are_recorded(
        self,
        cmbench: Cmbench,
        tmp_path: Path,
        inception_weights: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch, "compile", lambda network: network)
        images = np.random.RandomState(0).randint(0, 256, (4, 9, 9, 3)).astype(np.uint8)
        np.save(tmp_path / "a.npy", images)
        np.save(tmp_path / "b.npy", images[::-1] // 2)
        found = cmbench(
            "eval",
            str(tmp_path / "a.npy"),
            "--reference",
            str(tmp_path / "b.npy"),
            "--weights",
            str(inception_weights),
            "--no-record",
            "--json",
            "-q",
            "--metrics",
            "kd",
            "--extractor",
            "inception",
            "--bf16-extractor",
            "--channels-last-extractor",
            "--compile-extractor",
        )
        assert found.code == 0, found.err
        metric = json.loads(found.out)["metrics"]["kd"]
        assert is_approximate(metric["key"])
        assert ":tf1-bilinear+bfloat16+channels-last+compiled:" in metric["key"]
        wanted = "fast+bfloat16+channels-last+compiled"
        assert metric["detail"]["extractor_implementation"] == wanted
        assert 1e-5 < metric["detail"]["extractor_deviation"] < 0.1

    def test_others_refuse_it(self, cmbench: Cmbench, tmp_path: Path) -> None:
        np.save(tmp_path / "s.npy", digits()[:20])
        found = cmbench("eval", str(tmp_path / "s.npy"), "-d", "digits", "--bf16-extractor", "-q")
        assert found.code == 2
        assert "extractor 'digits-cnn': has no bfloat16 path" in found.err

    def test_only_preprocessing_says_so(self) -> None:
        assert is_approximate("fd:inception@0123abcd:tf1-bilinear+compiled:round:n-1")
        assert not is_approximate("fd:inception@0123abcd:tf1-bilinear:round:n-1")
        assert not is_approximate("fd:mine+compiled@0123abcd:none:round")
        assert not is_approximate("flow-map-mean:n=5:v1")
