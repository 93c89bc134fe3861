from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cmbench.metrics.census import (
    Census,
    CensusTaker,
    census_warnings,
    class_warnings,
    image_hashes,
)

TINT = torch.tensor([40.0, 0.0, -40.0])[:, None, None]


def pictures(count: int, seed: int) -> Tensor:
    """Return images with a warm tint, full range, some contrast."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 8, 8, generator=generator) * 50 + 120 + TINT
    return noise.clamp(0, 255).to(torch.uint8)


def take(images: Tensor, batch: int = 64) -> Census:
    taker = CensusTaker()
    for part in images.split(batch):
        taker.update(part)
    return taker.result()


REAL = take(pictures(400, 0))


def test_numbers_are_those_of_the_pixels_however_batched() -> None:
    images = pictures(100, 1)
    for census in (take(images, 100), take(images, 7)):
        as_float = images.double()
        assert census.mean is not None
        assert census.std is not None
        torch.testing.assert_close(census.mean, as_float.mean((0, 2, 3)))
        torch.testing.assert_close(census.std, as_float.transpose(0, 1).flatten(1).std(1, False))
        assert (census.low, census.high) == (int(images.min()), int(images.max()))
        assert torch.equal(census.hashes, image_hashes(images))


@given(st.integers(0, 63), st.integers(0, 2), st.integers(1, 255))
def test_hash_sees_every_pixel(position: int, channel: int, change: int) -> None:
    image = pictures(1, 2)
    other = image.clone()
    other[0, channel, position // 8, position % 8] += change
    assert image_hashes(image) != image_hashes(other)
    assert image_hashes(image) == image_hashes(image.clone())


def test_hash_of_floats() -> None:
    images = torch.randn(5, 2, 1, 1)
    assert len(image_hashes(images).unique()) == 5
    assert torch.equal(image_hashes(images), image_hashes(images.clone()))
    assert take(images).mean is None


def test_good_samples_raise_nothing() -> None:
    assert census_warnings(take(pictures(300, 3)), REAL) == []
    assert census_warnings(take(pictures(300, 3)), None) == []
    assert census_warnings(take(torch.randn(9, 2, 1, 1)), take(torch.randn(9, 2, 1, 1))) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: torch.cat([x, x[:4]]), "4 of 104 samples are duplicates"),
        (lambda x: torch.cat([x, pictures(400, 0)[:2]]), "2 of 102 samples equal a reference"),
        (lambda x: torch.full_like(x, 9) + torch.arange(100)[:, None, None, None], "one colour"),
        (lambda x: (x / 255.0).round().to(torch.uint8), r"all pixels .* lie in 0 … 1"),
        (lambda x: x // 2 + 128, "no pixel of the samples is below 128"),
        (lambda x: x // 4, "mean differs by"),
        (lambda x: x.flip(1), "BGR taken for RGB"),
        (lambda x: x[:, :1].expand(-1, 3, -1, -1).contiguous(), "100% of the samples are grey"),
    ],
)
def test_each_mistake_speaks(make: object, words: str) -> None:
    images = make(pictures(100, 4)).to(torch.uint8)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(census_warnings(take(images), REAL))


def photographs(count: int, seed: int, size: int = 32) -> Tensor:
    """Return images with the spectrum of photographs, 1/f^1.5."""
    random = np.random.RandomState(seed)
    axis = np.fft.fftfreq(size)
    frequency = np.sqrt(axis[:, None] ** 2 + axis[None] ** 2)
    frequency[0, 0] = 1 / size
    noise = np.fft.fft2(random.randn(count, 3, size, size)) / frequency**1.5
    images = np.fft.ifft2(noise).real
    images *= 45 / images.std()
    return torch.from_numpy((images + 120).clip(0, 255).astype(np.uint8))


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    rows = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        rows.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(rows).permute(0, 3, 1, 2)


def enlarged(images: Tensor, factor: float, mode: str) -> Tensor:
    small = functional.interpolate(
        images.float(), scale_factor=1 / factor, mode="bilinear", antialias=True
    )
    large = functional.interpolate(small, size=images.shape[2:], mode=mode)
    return large.clamp(0, 255).to(torch.uint8)


class TestTexture:
    """What was done to files before they were stored shows in the differences of neighbours."""

    REAL = take(photographs(200, 0))

    def test_good_samples_raise_nothing(self) -> None:
        for count in (20, 200):
            assert census_warnings(take(photographs(count, 1)), self.REAL) == []

    @pytest.mark.parametrize("quality", [90, 75])
    def test_jpeg_behind_png(self, quality: int) -> None:
        found = census_warnings(take(through_jpeg(photographs(200, 1), quality)), self.REAL)
        assert "JPEG-compressed" in found[0]

    @pytest.mark.parametrize(
        ("factor", "mode", "words"),
        [
            (2, "bilinear", "resized or blurred"),
            (4 / 3, "bicubic", "resized or blurred"),
            (2, "nearest", "enlarged"),
        ],
    )
    def test_enlarged_images(self, factor: float, mode: str, words: str) -> None:
        found = census_warnings(take(enlarged(photographs(200, 1), factor, mode)), self.REAL)
        assert words in found[0]

    def test_division_into_batches_changes_nothing(self) -> None:
        images = photographs(50, 2)
        whole, parts = take(images, 50), take(images, 7)
        assert (whole.roughness, whole.blocking) == (parts.roughness, parts.blocking)


class TestClasses:
    def test_labels_that_follow_the_data_raise_nothing(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 10, (5000,), generator=generator).bincount(minlength=10)
        counts = dict(enumerate(labels.tolist()))
        assert class_warnings(counts, [500] * 10) == []
        assert class_warnings({0: 1}, [500] * 10) == []
        assert class_warnings({}, [500] * 10) == []
        assert class_warnings({3: 7}, []) == []

    def test_imbalance_missing_and_unknown_classes(self) -> None:
        even = dict.fromkeys(range(10), 500)
        (missing,) = class_warnings(dict.fromkeys(range(9), 500), [500] * 10)
        assert "1 of 10 classes have no sample" in missing
        (skewed,) = class_warnings(even | {0: 900}, [500] * 10)
        assert "class 0 has 900 of 5400 samples where the data suggest 540" in skewed
        (unknown,) = class_warnings(even | {12: 1}, [500] * 10)
        assert "labels [12] are none of the 10 classes" in unknown
