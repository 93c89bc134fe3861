"""The extractor of the `cifar10-jpeg` benchmark: a small residual classifier of 32x32 pictures.

Its weights ship with the package (``weights/cifar-cnn.safetensors``) and are made by
``benchmarks/train_cifar_extractor.py``; ``weights/cifar-cnn.json`` holds their hash and the test
accuracy that the script measured. Distances on its features are called ``fd-cifar-cnn``: they are
compared with nothing but themselves, and never called FID.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmbench.errors import MissingError, UserError
from cmbench.metrics._files import read_tensors, sha256_file
from cmbench.metrics.extractor import Features
from cmbench.metrics.precision import exact_float32
from cmbench.metrics.quantize import to_float255
from cmbench.metrics.weight_files import weights_folder

WEIGHTS = Path(__file__).parent / "weights" / "cifar-cnn.safetensors"
KIND = "cifar-cnn"
FEATURE_DIM = 256
_SCRIPT = "benchmarks/train_cifar_extractor.py"
#: Per-channel mean and spread that centre the input, in [-1, 1]; rounded, and part of the network.
_MEAN, _STD = (-0.02, -0.04, -0.11), (0.49, 0.49, 0.52)


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a skip; the first may halve the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        h = functional.silu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        x = functional.avg_pool2d(x, self.stride) if self.stride > 1 else x
        x = x if self.skip is None else self.skip(x)
        return functional.silu(x + h)


class CifarNetwork(nn.Module):
    """A stem and four residual blocks, 1.5M parameters; channel means are the features."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.blocks = nn.Sequential(
            ResidualBlock(64, 64, 1),
            ResidualBlock(64, 128, 2),
            ResidualBlock(128, 128, 1),
            ResidualBlock(128, FEATURE_DIM, 2),
        )
        self.output = nn.Linear(FEATURE_DIM, classes)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[N, 3, 32, 32]`` in [-1, 1] to features ``[N, 256]`` and logits ``[N, 10]``."""
        h = functional.silu(self.norm(self.stem((x - self.mean) / self.std)))
        features = self.blocks(h).mean((2, 3))
        return features, self.output(features)


class CifarExtractor:
    """Features and logits of :class:`CifarNetwork` with the shipped, verified weights.

    Args:
        location: a weights file other than the shipped one; its JSON lies beside it.

    Raises:
        MissingError: the weights or their JSON are not there.
        UserError: the file's hash is not the one in the JSON.
    """

    name = "cifar-cnn"
    short_name = "cifar-cnn"
    preprocessing = "none"
    image_shape = (3, 32, 32)
    feature_dim = FEATURE_DIM

    def __init__(self, location: Path | str | None = None) -> None:
        own = weights_folder() / WEIGHTS.name  # trained by the user, where none are shipped
        shipped = WEIGHTS if WEIGHTS.is_file() or not own.is_file() else own
        path = shipped if location is None else Path(location)
        self.weights_sha256 = _verified_hash(path)
        tensors, _ = read_tensors(path, KIND)
        self.network = CifarNetwork().eval().requires_grad_(False)
        # Convolutions are stored in bfloat16, the precision they were trained in.
        kept = self.network.state_dict()
        self.network.load_state_dict({k: v.to(kept[k].dtype) for k, v in tensors.items()})
        self.device = torch.device("cpu")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of ``[N, 3, 32, 32]`` images: uint8, or float in [-1, 1]."""
        if images.dim() != 4 or images.shape[1:] != (3, 32, 32):
            raise UserError(
                "cifar-cnn extractor",
                f"images of shape {tuple(images.shape)}",
                allowed="[N, 3, 32, 32]",
                remedy="this extractor is for 32x32 colour pictures only",
            )
        pixels = to_float255(images.to(self.device))
        with exact_float32():
            features, logits = self.network(pixels / 127.5 - 1)
        return Features(pool=features, logits=logits)

    def to(self, device: torch.device | str) -> Self:
        """Move the network to ``device``."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self


def _verified_hash(path: Path) -> str:
    facts = path.with_suffix(".json")
    for needed in (path, facts):
        if not needed.is_file():
            raise MissingError(
                "cifar-cnn extractor",
                f"no file {needed}",
                allowed="the weights and their JSON",
                remedy=f"reinstall cmbench, or run {_SCRIPT} --source ARCHIVE",
            )
    expected = str(json.loads(facts.read_text("utf-8")).get("sha256", "none"))
    found = sha256_file(path)
    if found != expected:
        raise UserError(
            str(path),
            f"sha256 {found[:16]}… is not the recorded one",
            allowed=f"{expected[:16]}…",
            remedy=f"reinstall cmbench, or run {_SCRIPT} --source ARCHIVE",
        )
    return found
