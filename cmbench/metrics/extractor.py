"""The protocol of feature extractors, and the identity extractor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.precision import exact_float32, row_blocks

#: Images at a time on the CPU: bounds memory whatever the batch; larger ones leave the cache.
CPU_BLOCK = 8


@dataclass(frozen=True, eq=False)
class Features:
    """One batch of features.

    ``pool`` ``[N, D]`` feeds distances; ``logits`` ``[N, K]`` (unnormalised, of the extractor's own
    classifier) the inception score; ``spatial`` ``[N, S]`` the spatial distance.
    """

    pool: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


@runtime_checkable
class Extractor(Protocol):
    """Turns images into features; deterministic, float32, the same for any batch size.

    Called with ``[N, C, H, W]`` images: uint8 in [0, 255] or float in [-1, 1] (unbounded for
    "pixels"). ``preprocessing`` names resize and scaling and is part of every metric key.
    """

    #: Name as in ``cmbench list extractors``.
    name: str
    #: What follows ``fd-`` in the name of its distance. The 2015 Inception network with verified
    #: weights names the distance itself: ``fid`` or ``fid-<preprocessing>``. No other may.
    short_name: str
    #: Hash of the weights file; of the name where there are no weights.
    weights_sha256: str
    #: Resize and scaling, in one word.
    preprocessing: str
    #: D, the width of ``Features.pool``.
    feature_dim: int

    def __call__(self, images: Tensor) -> Features:
        """Return the features of one batch."""

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device`` and return itself."""


def extract_rgb(
    who: str, images: Tensor, device: torch.device, extract: Callable[[Tensor], Features]
) -> Features:
    """Return the features of RGB images ``[N, 3, H, W]``, extracted in float32 on ``device``.

    Raises:
        UserError: images of another shape; ``who`` begins the message.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise UserError(
            who,
            f"images of shape {tuple(images.shape)}",
            allowed="RGB [N, 3, H, W]",
            remedy="convert grey images to RGB, and put channels second",
        )
    size = CPU_BLOCK if device.type == "cpu" else max(len(images), 1)
    with exact_float32():
        blocks = row_blocks(images.to(device, non_blocking=True), size)
        parts = [extract(block) for block in blocks]
    return Features(*(_join([getattr(part, f.name) for part in parts]) for f in fields(Features)))


def _join(parts: list[Tensor | None]) -> Any:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


class PixelExtractor:
    """The identity: features are the values of the image themselves.

    For data whose own space is meaningful (Gaussian mixtures). ``location`` is unused; the width
    is that of the first batch.
    """

    name = "pixels"
    short_name = "pixels"
    preprocessing = "identity"
    weights_sha256 = hashlib.sha256(b"pixels").hexdigest()

    def __init__(self, location: object = None, *, feature_dim: int = 0) -> None:
        self.feature_dim = feature_dim

    def __call__(self, images: Tensor) -> Features:
        """Return images ``[N, C, H, W]`` as rows ``[N, C*H*W]`` in float64."""
        if images.dim() != 4:
            raise UserError(
                "pixels extractor", f"images of shape {tuple(images.shape)}", allowed="[N, C, H, W]"
            )
        self.feature_dim = images[0].numel()
        return Features(pool=images.flatten(1).double())

    def to(self, device: torch.device | str) -> Self:
        """Return itself; it has nothing to move."""
        return self
