"""The protocol of feature extractors, and the identity extractor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from cmbench.errors import UserError


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

    @property
    def name(self) -> str:
        """Name as in ``cmbench list extractors``."""

    @property
    def short_name(self) -> str:
        """What follows ``fd-`` in the name of its distance.

        The 2015 Inception network with verified weights names the distance itself: ``fid`` or
        ``fid-<preprocessing>``. No other extractor may.
        """

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights file; of the name where there are no weights."""

    @property
    def preprocessing(self) -> str:
        """Resize and scaling, in one word."""

    @property
    def feature_dim(self) -> int:
        """D, the width of ``Features.pool``."""

    def __call__(self, images: Tensor) -> Features:
        """Return the features of one batch."""

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device`` and return itself."""


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
