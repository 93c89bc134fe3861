from __future__ import annotations

import numpy as np
import pytest
from dataset_builders import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmbench.data.pictures import PictureError
from cmbench.data.transforms import TRANSFORMS, adm_crop, edm_crop, lsun_crop

CROPS = [name for name in TRANSFORMS if name != "none"]


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", CROPS)
@settings(max_examples=30, deadline=None)
@given(height=st.integers(5, 90), width=st.integers(5, 90), size=st.integers(4, 16))
def test_any_image_becomes_the_size_asked_for(
    name: str, height: int, width: int, size: int
) -> None:
    assert TRANSFORMS[name](image(height, width), size).size == (size, size)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_image_of_the_right_size_stays_as_it_is(name: str) -> None:
    given_ = Image.fromarray(pictures(1, 16)[0])
    assert np.array_equal(np.asarray(TRANSFORMS[name](given_, 16)), np.asarray(given_))


def test_none_refuses_another_size() -> None:
    with pytest.raises(PictureError, match=r"is 9x16"):
        TRANSFORMS["none"](image(16, 9), 8)


def test_adm_halves_by_the_mean_of_four() -> None:
    # From 32 to 16: one box halving, computed here by numpy, and no other step.
    pixels = np.asarray(image(32, 32)).astype(float)
    mean = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
    # Pillow rounds to bytes after each of its two passes: half a level each.
    assert np.abs(np.asarray(adm_crop(image(32, 32), 16)) - mean).max() <= 1


def test_adm_cuts_the_middle_of_the_long_side() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (np.asarray(adm_crop(Image.fromarray(wide), 8)) == 200).all()


def test_edm_cuts_before_it_shrinks() -> None:
    # Outside the central square nothing leaks in, which shrinking first would let.
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 200
    assert (np.asarray(edm_crop(Image.fromarray(wide), 8)) == 200).all()


def test_the_three_differ() -> None:
    made = [np.asarray(crop(image(50, 70), 16)) for crop in (adm_crop, edm_crop, lsun_crop)]
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert not np.array_equal(made[1], made[2])


def test_dhariwal_is_the_adm_crop() -> None:
    assert TRANSFORMS["dhariwal-crop"] is TRANSFORMS["adm-crop"]
