from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from metric_kit import metrics
from torch import Tensor

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics.catalog import EXTRACTORS, METRICS
from cmbench.metrics.extractor import Extractor, PixelExtractor
from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.metric import open_metrics
from cmbench.metrics.precision_recall import PrecisionRecall, precision_recall
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import cached_reference, load_reference
from cmbench.metrics.shipped_cnn import DigitsExtractor
from cmbench.metrics.statistics import moments_of
from cmbench.metrics.suite import MetricSuite
from cmbench.plugin.specs import load_object
from cmbench.sweep.context import Context

DIGITS_METRICS = ("fd-digits", "is", "precision", "recall", "density", "coverage", "kd")


def pictures(count: int, seed: int, contrast: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, contrast, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def make_reference(
    extractor: Extractor, count: int = 300, folder: Path | None = None, quantization: str = "round"
) -> Reference:
    return cached_reference(
        lambda: pictures(count, 0).split(64),
        extractor,
        source="made up",
        source_sha256=f"{count:064d}",
        quantization=quantization,
        folder=folder,
    )


@pytest.fixture(scope="module")
def extractor() -> DigitsExtractor:
    return DigitsExtractor()


@pytest.fixture(scope="module")
def reference(extractor: DigitsExtractor) -> Reference:
    return make_reference(extractor)


def suite(extractor: DigitsExtractor, reference: Reference, *names: str) -> MetricSuite:
    return MetricSuite(
        metrics(*(names or DIGITS_METRICS)), extractor=extractor, reference=reference
    )


def test_every_metric_of_one_pass(extractor: DigitsExtractor, reference: Reference) -> None:
    scores = suite(extractor, reference)
    for batch in pictures(250, 1, 200).split(100):
        scores.update(batch)
    values = scores.finalize()
    assert tuple(values) == DIGITS_METRICS
    directions = {spec.name: spec.higher_is_better for spec in METRICS}
    for name, value in values.items():
        assert value.name == name
        assert value.higher_is_better == directions[name]
        assert f"digits-cnn@{extractor.weights_sha256[:8]}:none:round" in value.key
        assert "n=250" in value.key
    distance = values["fd-digits"]
    rows = extractor(pictures(250, 1, 200)).pool
    alone = frechet_distance(moments_of(rows), moments_of(extractor(pictures(300, 0)).pool))
    assert distance.value == pytest.approx(alone, rel=1e-6)
    assert distance.detail["samples"] == 250
    assert distance.detail["reference_samples"] == 300
    assert distance.detail["covariance_divisor"] == "n-1"
    assert distance.detail["infinity"]["value"] < distance.value
    assert distance.standard_error is not None
    reach = 1.959964 * distance.standard_error
    assert distance.interval == pytest.approx((distance.value - reach, distance.value + reach))
    low, high = distance.detail["infinity"]["interval"]
    assert (low + high) / 2 == pytest.approx(distance.detail["infinity"]["value"]), "its own"
    assert values["kd"].interval is not None
    assert values["is"].detail["real"] == pytest.approx(reference.score.mean)


def test_the_interval_of_a_distance_is_not_below_zero(extractor: DigitsExtractor) -> None:
    reference = make_reference(extractor, count=40)
    scores = suite(extractor, reference, "fd-digits")
    scores.update(torch.cat([pictures(39, 0), pictures(1, 9, 1)]))
    found = scores.finalize()["fd-digits"]
    assert found.standard_error is not None
    assert found.value < found.standard_error
    assert found.interval is not None
    assert found.interval[0] == 0
    assert found.interval[1] > found.value


def test_metrics_of_one_family_share_their_work(
    extractor: DigitsExtractor, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counted(*arguments: Tensor, **options: Any) -> PrecisionRecall:
        passes.append(1)
        return precision_recall(*arguments, **options)

    monkeypatch.setattr("cmbench.metrics.precision_recall.precision_recall", counted)
    scores = suite(extractor, reference, "precision", "recall", "density", "coverage")
    scores.update(pictures(60, 1))
    assert len({value.value for value in scores.finalize().values()}) == 4
    assert len(passes) == 1


def test_division_and_order_of_samples_change_nothing(
    extractor: DigitsExtractor, reference: Reference
) -> None:
    images = pictures(90, 2)
    whole = suite(extractor, reference)
    whole.update(images)
    parts = suite(extractor, reference)
    for rank in (2, 0, 1):
        for chunk in torch.arange(rank, 90, 3).flip(0).split(11):
            parts.update(images[chunk], indices=chunk)
    found = parts.finalize()
    for name, value in whole.finalize().items():
        assert found[name].value == pytest.approx(value.value, rel=1e-5, abs=1e-9), name
        assert found[name].key == value.key


def test_float_images_are_quantized_by_the_named_rule(
    extractor: DigitsExtractor, reference: Reference
) -> None:
    images = pictures(60, 3)
    bytes_suite, float_suite = (suite(extractor, reference, "fd-digits") for _ in range(2))
    bytes_suite.update(images)
    float_suite.update(images.float() / 127.5 - 1)
    assert float_suite.finalize() == bytes_suite.finalize()
    with pytest.raises(NonFiniteError):
        float_suite.update(torch.full((2, 1, 8, 8), torch.nan))


def test_flow_map_error_is_in_units_of_the_data() -> None:
    def exact(noise: Tensor, labels: Tensor | None) -> Tensor:
        return 2 * noise

    scores = MetricSuite(metrics("flow-map-mean", "flow-map-max"), exact=exact, data_std=0.5)
    noise = torch.randn(200, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    shift = torch.zeros_like(noise)
    shift[:, 0] = torch.linspace(0, 1, 200)[:, None, None]
    scores.update(2 * noise + shift, noise)
    values = scores.finalize()
    # An error e in one of two coordinates has a root mean square of e/√2, in units of 0.5.
    assert values["flow-map-max"].value == pytest.approx(1 / 2**0.5 / 0.5, rel=1e-6)
    assert values["flow-map-mean"].value == pytest.approx(0.5 / 2**0.5 / 0.5, rel=1e-6)
    assert values["flow-map-mean"].standard_error == pytest.approx(
        float((shift[:, 0] / 2**0.5 / 0.5).std()) / 200**0.5, rel=1e-5
    )
    with pytest.raises(UserError, match="no noise"):
        scores.update(noise)
    with pytest.raises(UserError, match="no exact flow map; allowed: analytic datasets"):
        MetricSuite(metrics("flow-map-mean"))


def test_pixels_are_features_of_unbounded_data() -> None:
    data = torch.randn(500, 2, 1, 1, generator=torch.Generator().manual_seed(0)) * 5
    pixels = PixelExtractor()
    reference = cached_reference(
        lambda: [data], pixels, source="points", source_sha256="0", quantization="none", folder=None
    )
    scores = MetricSuite(
        metrics("fd-pixels", "precision"),
        extractor=pixels,
        reference=reference,
        quantization="none",
    )
    scores.update(data + torch.tensor([3.0, 4.0])[None, :, None, None])
    values = scores.finalize()
    assert values["fd-pixels"].value == pytest.approx(25, rel=1e-5)
    assert values["precision"].value < 1


class TestNames:
    def test_fid_belongs_to_inception(
        self, extractor: DigitsExtractor, reference: Reference
    ) -> None:
        instead_of = {
            "fid": "fd-digits",
            "fid-clean": "fd-digits",
            "fd-pixels": "fd-digits",
            "kid": "kd",
            "sfid": "sfd-digits",
        }
        for metric, instead in instead_of.items():
            with pytest.raises(UserError, match=rf"2015 Inception.*ask for '{instead}'"):
                suite(extractor, reference, metric)
        with pytest.raises(UserError, match=r"unknown metric 'percision'.*'precision'"):
            suite(extractor, reference, "percision")

    def test_missing_parts_are_named(
        self, extractor: DigitsExtractor, reference: Reference
    ) -> None:
        with pytest.raises(UserError, match="no extractor"):
            MetricSuite(metrics("fd-digits"))
        with pytest.raises(UserError, match="no reference"):
            MetricSuite(metrics("fd-digits"), extractor=extractor)
        with pytest.raises(UserError, match="has no spatial features"):
            suite(extractor, reference, "sfd-digits")
        bare = replace(reference, features=None)
        suite(extractor, bare, "fd-digits")
        with pytest.raises(UserError, match=r"'kd'.*mean and a covariance only.*from images"):
            suite(extractor, bare, "kd")
        MetricSuite(metrics("is"), extractor=extractor)
        pixels = PixelExtractor()
        flat = MetricSuite(metrics("is"), extractor=pixels, quantization="none")
        flat.update(torch.zeros(20, 2, 1, 1))
        with pytest.raises(UserError, match="'pixels' gave no logits; allowed: an extractor with"):
            flat.finalize()

    def test_the_wrong_reference_is_refused(self, extractor: DigitsExtractor) -> None:
        truncated = make_reference(extractor, quantization="truncate")
        with pytest.raises(UserError, match="made with quantization 'truncate'; allowed: 'round'"):
            suite(extractor, truncated)
        other = replace(truncated, key=replace(truncated.key, extractor_sha256="ab" * 32))
        with pytest.raises(UserError, match="made with weights 'abab"):
            suite(extractor, other)

    def test_catalog_is_complete_and_free_of_torch(self) -> None:
        for spec in (*EXTRACTORS, *METRICS):
            assert callable(load_object(spec.factory)), spec.name
        code = "import cmbench.metrics.catalog, sys; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestWarnings:
    def test_duplicates(self, extractor: DigitsExtractor, reference: Reference) -> None:
        images = pictures(160, 4)
        scores = suite(extractor, reference, "fd-digits")
        scores.update(torch.cat([images, images[:3]]))
        assert any("3 of 163 samples are duplicates" in warning for warning in scores.warnings)
        clean = suite(extractor, reference, "fd-digits")
        clean.update(images)
        assert clean.warnings == []

    def test_few_samples(self, extractor: DigitsExtractor, reference: Reference) -> None:
        scores = suite(extractor, reference, "fd-digits")
        scores.update(pictures(40, 5))
        warnings = "\n".join(scores.warnings)
        assert "40 samples for 64 features: the covariance is rank-deficient" in warnings
        assert "40 samples against 300 reference images" in warnings
        detail = scores.finalize()["fd-digits"].detail
        assert detail["rank_deficient"] is True
        assert detail["infinity"]["reliable"] is False

    def test_one_image_counted_twice_is_an_error(
        self, extractor: DigitsExtractor, reference: Reference
    ) -> None:
        scores = suite(extractor, reference, "fd-digits")
        scores.update(pictures(8, 6), indices=torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]))
        with pytest.raises(UserError, match=r"1 sample numbers occur twice.*without padding"):
            scores.finalize()
        with pytest.raises(UserError, match="no samples"):
            suite(extractor, reference, "fd-digits").finalize()

    def test_class_counts(self, extractor: DigitsExtractor, reference: Reference) -> None:
        scores = suite(extractor, reference, "fd-digits")
        scores.update(pictures(4, 7), labels=torch.tensor([3, 1, 3, 3]))
        assert scores.class_counts == {1: 1, 3: 3}


class TestReferenceCache:
    def test_the_second_use_reads_no_image(
        self, extractor: DigitsExtractor, tmp_path: Path
    ) -> None:
        first = make_reference(extractor, folder=tmp_path)

        def images() -> Iterator[Tensor]:
            raise AssertionError("reference work done twice")

        second = cached_reference(
            images,
            extractor,
            source="made up",
            source_sha256=f"{300:064d}",
            quantization="round",
            folder=tmp_path,
        )
        assert second.key == first.key
        assert second.moments.sha256 == first.moments.sha256
        assert second.score == first.score
        assert second.kernel is not None

    def test_all_that_decides_it_is_in_its_name(
        self, extractor: DigitsExtractor, tmp_path: Path
    ) -> None:
        make_reference(extractor, folder=tmp_path)
        make_reference(extractor, count=301, folder=tmp_path)
        make_reference(extractor, quantization="truncate", folder=tmp_path)
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_damaged_file_is_made_anew_and_says_so(
        self, extractor: DigitsExtractor, tmp_path: Path
    ) -> None:
        whole = make_reference(extractor, folder=tmp_path)
        (path,) = tmp_path.iterdir()
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match="does not match its hash"):
            load_reference(path)
        again = make_reference(extractor, folder=tmp_path)
        assert again.moments.sha256 == whole.moments.sha256
        assert "reference computed again" in again.notes[0]
        scores = suite(extractor, again, "fd-digits")
        scores.update(pictures(200, 1))
        assert scores.warnings == list(again.notes)
        assert make_reference(extractor, folder=tmp_path).notes == ()

    def test_a_file_of_another_key_is_refused(
        self, extractor: DigitsExtractor, tmp_path: Path
    ) -> None:
        reference = make_reference(extractor, folder=tmp_path)
        (path,) = tmp_path.iterdir()
        with pytest.raises(UserError, match="was made for"):
            load_reference(path, replace(reference.key, source="other"))

    def test_no_images_is_an_error(self, extractor: DigitsExtractor) -> None:
        with pytest.raises(UserError, match="reference 'empty': no images"):
            cached_reference(
                list,
                extractor,
                source="empty",
                source_sha256="0",
                quantization="round",
                folder=None,
            )


@pytest.mark.parametrize("dataset", ["digits", "gmm"])
def test_a_cached_reference_gives_the_bits_of_a_fresh_one(
    context: Context, dataset: str, tmp_path: Path
) -> None:
    """Records of an interrupted sweep equal those of one that was not."""
    spec, data = context.dataset_spec(dataset), context.dataset(dataset)
    extractor = context.plugins.extractors.load(spec.extractor)()
    images = torch.cat(list(data.reference_images()))[:400]
    generator = torch.Generator().manual_seed(0)
    span = float(images.max()) - float(images.min())
    noisy = images[:300] + 0.2 * span * torch.randn(images[:300].shape, generator=generator)
    samples = noisy.clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else noisy

    def reference() -> Reference:
        return cached_reference(
            lambda: images.split(150),
            extractor,
            source=dataset,
            source_sha256="0" * 64,
            quantization=spec.quantize,
            folder=tmp_path,
        )

    found = []
    for known in (reference(), reference(), reference().to("cpu")):
        names = [name for name in spec.metrics if not name.startswith("flow-map")]
        suite = MetricSuite(
            open_metrics(context.plugins, [*names, "kd", "precision", "recall"]),
            extractor=extractor,
            reference=known,
            quantization=spec.quantize,
        )
        suite.update(samples)
        found.append({name: asdict(value) for name, value in suite.finalize().items()})
    assert found[0] == found[1] == found[2]
    assert {known["value"] for known in found[0].values()}.isdisjoint({0.0, 1.0})
