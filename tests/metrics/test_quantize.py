from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics.quantize import RULES, quantize, to_float255

PIXELS = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def test_stored_pixels_survive_both_rules_of_rounding_to_themselves() -> None:
    as_float = PIXELS.float() / 127.5 - 1
    assert torch.equal(quantize(as_float, "round"), PIXELS)
    # Truncation keeps a pixel or, where the float lies a rounding error below it, loses one level.
    lost = PIXELS.int() - quantize(as_float, "truncate").int()
    assert set(lost.unique().tolist()) <= {0, 1}


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_rules_are_the_published_formulas(values: list[float]) -> None:
    images = torch.tensor(values)[None, None, None]
    x = np.array(values, dtype=np.float32)
    half, one = np.float32(127.5), np.float32(128)
    rounded = np.clip(x * half + one, 0, 255).astype(np.uint8)
    truncated = np.clip(x * half + half, 0, 255).astype(np.uint8)
    assert quantize(images, "round").flatten().tolist() == rounded.tolist()
    assert quantize(images, "truncate").flatten().tolist() == truncated.tolist()
    assert quantize(images, "none") is images


def test_rules_differ_by_half_a_level() -> None:
    between = torch.full((1, 1, 1, 1), 100.7 / 127.5 - 1)
    assert [int(quantize(between, rule)) for rule in ("round", "truncate")] == [101, 100]
    assert RULES == ("round", "truncate", "none")


def test_float_and_byte_images_mean_the_same_pixels() -> None:
    assert torch.equal(to_float255(PIXELS), PIXELS.float())
    floats = PIXELS.float() / 127.5 - 1
    torch.testing.assert_close(to_float255(floats), PIXELS.float(), rtol=0, atol=2e-5)


def test_bad_input_is_refused_before_it_becomes_pixels() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1 of 3 images hold NaN.*earlier checkpoint"):
        quantize(images, "round")
    with pytest.raises(UserError, match=r"dtype torch\.uint8; allowed: float images"):
        quantize(PIXELS, "round")
    with pytest.raises(UserError, match=r"unknown quantization rule 'rond'.*did you mean 'round'"):
        quantize(torch.zeros(1, 1, 1, 1), "rond")
