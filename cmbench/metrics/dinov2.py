"""DINOv2 features for FD-DINOv2 (Stein et al. 2023), with dgm-eval's preprocessing.

The network is timm's vision transformer with the weights as Meta publishes them; the position
embedding is brought to 224 x 224 by DINOv2's own rule, which is not timm's. torch-fidelity has a
DINOv2 too, but it downloads a repository's code, has no offline path, and resizes otherwise, so its
distances compare with no published ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.files import sha256_file
from cmbench.metrics._files import read_state
from cmbench.metrics.extractor import Features, extract_rgb
from cmbench.metrics.weight_files import find_weights

SIZE, PATCH = 224, 14
#: Architecture -> (timm's name, feature width).
ARCHITECTURES = {
    "vits14": ("vit_small_patch14_dinov2", 384),
    "vitb14": ("vit_base_patch14_dinov2", 768),
    "vitl14": ("vit_large_patch14_dinov2", 1024),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoExtractor:
    """Class-token features of DINOv2 (1,024 for ViT-L/14), no logits.

    Args:
        location: ``dinov2_vitl14_pretrain.pth`` as published; None looks in the usual places. The
            publisher names no hash, so the file's own goes into the metric key.
        architecture: "vitl14" (FD-DINOv2's), "vitb14" or "vits14".
        resize: "pil-bicubic-8bit" (dgm-eval's), or "edm2": torch's antialiased bicubic in float32,
            unclipped, behind EDM2's reference statistics.

    Raises:
        MissingError: timm or the weights are not there.
        UserError: a file of another architecture, or no state dict.
    """

    def __init__(
        self,
        location: Path | str | None = None,
        *,
        architecture: str = "vitl14",
        resize: str = "pil-bicubic-8bit",
    ) -> None:
        if resize not in RESIZES:
            raise unknown_name("dinov2 extractor", "resize", resize, RESIZES)
        if architecture not in ARCHITECTURES:
            raise unknown_name("dinov2 extractor", "architecture", architecture, ARCHITECTURES)
        path = find_weights("dinov2", location)
        self.weights_sha256 = sha256_file(path)
        suffix = "" if architecture == "vitl14" else f"-{architecture}"
        self.preprocessing = resize
        self.name = self.short_name = f"dinov2{suffix}"
        if resize == "edm2":
            self.short_name += "-edm2"
        timm_name, self.feature_dim = ARCHITECTURES[architecture]
        self.network = _load(path, timm_name)
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        """Move the network to ``device``."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of RGB images ``[N, 3, H, W]``, uint8."""
        if images.dtype != torch.uint8:
            raise UserError(
                "dinov2 extractor",
                f"images of {images.dtype}",
                allowed="uint8",
                remedy="quantize the samples: its resizer is PIL's on bytes",
            )
        return extract_rgb("dinov2 extractor", images, self.device, self._extract)

    def _extract(self, images: Tensor) -> Features:
        mean = torch.tensor(MEAN, device=self.device)[:, None, None]
        std = torch.tensor(STD, device=self.device)[:, None, None]
        pixels = RESIZES[self.preprocessing](images).to(self.device)
        return Features(self.network((pixels / 255 - mean) / std))


def edm2(location: Path | str | None = None) -> DinoExtractor:
    """Return DINOv2 ViT-L/14 as EDM2 resizes for it."""
    return DinoExtractor(location, resize="edm2")


def resized(images: Tensor) -> Tensor:
    """Return PIL's bicubic 224 x 224 of uint8 images, in bytes, as float32 (dgm-eval's default)."""
    rows = []
    for image in images.cpu().permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        rows.append(torch.from_numpy(np.array(picture)))
    return torch.stack(rows).permute(0, 3, 1, 2).float()


def resized_by_torch(images: Tensor) -> Tensor:
    """Return torch's antialiased bicubic 224 x 224 of uint8 images, float32, unclipped (EDM2)."""
    return functional.interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True)


RESIZES = {"pil-bicubic-8bit": resized, "edm2": resized_by_torch}


def interpolated_positions(positions: Tensor) -> Tensor:
    """Return DINOv2's position embedding ``[1, 1 + M², D]`` for 224 x 224: ``[1, 257, D]``.

    Bicubic without antialiasing, by the scale (16 + 0.1) / M: the offset is DINOv2's, and so the
    sampling points differ from those of a resize to 16 x 16.
    """
    side, old = SIZE // PATCH, math.isqrt(positions.shape[1] - 1)
    if old == side:
        return positions
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert grid.shape[2:] == (side, side)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _load(path: Path, timm_name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingError(
            "dinov2 extractor", "timm is not installed", remedy="pip install timm"
        ) from error
    who, allowed = f"weights {path}", f"DINOv2's published state dict ({timm_name})"
    remedy = "run `cmbench prepare dinov2`"
    state = read_state(path, who, allowed, remedy, "pos_embed")
    state.pop("mask_token", None)  # of pre-training only
    state["pos_embed"] = interpolated_positions(state["pos_embed"].float())
    network: nn.Module = timm.create_model(
        timm_name, pretrained=False, img_size=SIZE, num_classes=0
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(who, reason, allowed=allowed, remedy=remedy) from error
    return network.eval().requires_grad_(False)
