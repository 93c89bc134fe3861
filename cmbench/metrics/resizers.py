"""The resizers of the FID libraries, batched: pixels in [0, 255] to 299 x 299."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from cmbench.metrics.inception_fast import INPUT_SIZE, tf1_resize_matrix


@lru_cache(maxsize=32)
def pil_bicubic_matrix(size: int) -> Tensor:
    """Return the matrix ``[299, size]`` of PIL's bicubic along one axis, float64.

    Keys' cubic with a = -0.5, widened by the scale when shrinking, cut at the border and
    normalised, as in Pillow's ``Resample.c``. torch's antialiased bicubic rounds the weights to
    float32, which shows as 0.006 of 255 when shrinking.
    """
    scale = size / INPUT_SIZE
    stretch = max(scale, 1.0)
    centre = (torch.arange(INPUT_SIZE, dtype=torch.float64)[:, None] + 0.5) * scale
    source = torch.arange(size, dtype=torch.float64)[None]
    low = (centre - 2 * stretch + 0.5).trunc().clamp(min=0)
    high = (centre + 2 * stretch + 0.5).trunc().clamp(max=size)
    x = ((source - centre + 0.5) / stretch).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = torch.where((source >= low) & (source < high), weights, 0.0)
    return weights / weights.sum(1, keepdim=True)


def pil_bicubic(pixels: Tensor) -> Tensor:
    """Return clean-fid's ``clean``: PIL's bicubic per channel in float32, clipped, as floats."""
    rows = pil_bicubic_matrix(pixels.shape[2]).to(pixels)
    columns = pil_bicubic_matrix(pixels.shape[3]).to(pixels)
    return (rows @ (pixels @ columns.T)).clamp(0, 255)


def half_pixel_bilinear(pixels: Tensor) -> Tensor:
    """Return clean-fid's ``legacy_pytorch``: torch's bilinear without antialiasing, clipped."""
    size = (INPUT_SIZE, INPUT_SIZE)
    resized = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return resized.clamp(0, 255)


def tf1_bilinear(pixels: Tensor) -> Tensor:
    """Return ``legacy_tensorflow``: TensorFlow 1's bilinear, as inside the 2015 graph."""
    rows = tf1_resize_matrix(pixels.shape[2], dtype=pixels.dtype).to(pixels.device)
    columns = tf1_resize_matrix(pixels.shape[3], dtype=pixels.dtype).to(pixels.device)
    return rows @ pixels @ columns.T
