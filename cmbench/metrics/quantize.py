"""From float images to the bytes that extractors see, by a named rule.

The rule moves FID by a few hundredths of a percent of its scale, so it is part of the metric key.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cmbench.errors import NonFiniteError, UserError, unknown_name

Quantization = Literal["round", "truncate", "none"]
RULES: tuple[str, ...] = get_args(Quantization)
#: What a key says of samples that came as bytes, made by an unknown rule.
STORED = "stored"


def quantize(images: Tensor, rule: str) -> Tensor:
    """Turn images in [-1, 1] into what an extractor takes.

    Args:
        images: float ``[N, C, H, W]``; values beyond [-1, 1] are clipped except under "none".
        rule: "round" is floor(127.5 x + 128) (EDM's ``generate.py``), "truncate" is
            floor(127.5 (x + 1)) (the consistency-model and OpenAI scripts), both to uint8;
            "none" hands the floats on as they are.

    Raises:
        UserError: an unknown rule, or images that are already integers.
        NonFiniteError: NaN or infinite values, which a cast to uint8 would turn into pixels.
    """
    if rule not in RULES:
        raise unknown_name("quantize", "quantization rule", rule, RULES)
    if not images.is_floating_point():
        raise UserError(
            "quantize",
            f"images of dtype {images.dtype}",
            allowed="float images in [-1, 1]",
            remedy="pass stored uint8 images to the extractor directly",
        )
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images).flatten(1).all(1)).sum())
        raise NonFiniteError(
            "quantize",
            f"{bad} of {len(images)} images hold NaN or infinite values",
            remedy="the generator diverged: sample from an earlier checkpoint",
        )
    if rule == "none":
        return images
    offset = 128.0 if rule == "round" else 127.5
    return (images * 127.5 + offset).clamp_(0, 255).to(torch.uint8)


def to_float255(images: Tensor) -> Tensor:
    """Return float32 pixel values in [0, 255] of uint8 images or of floats in [-1, 1]."""
    if images.dtype == torch.uint8:
        return images.float()
    return images.float() * 127.5 + 127.5
