"""The extractor of the `digits` benchmark: a small classifier of 8x8 grey digits.

Its weights ship with the package (``weights/digits-cnn.safetensors``) and are reproduced by
``benchmarks/train_digits_extractor.py``; ``weights/digits-cnn.json`` holds their hash and the
held-out accuracy that the script measured. Distances on its features are called ``fd-digits``.
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

WEIGHTS = Path(__file__).parent / "weights" / "digits-cnn.safetensors"
KIND = "digits-cnn"
FEATURE_DIM = 64


class DigitsNetwork(nn.Module):
    """Four convolutions with one pool between; the channel means are the features.

    Channel means rather than a hidden layer: at the same accuracy they tell noise and blur from
    digits more clearly, measured in distances between two real halves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, FEATURE_DIM, 3, padding=1)
        self.output = nn.Linear(FEATURE_DIM, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[N, 1, 8, 8]`` in [-1, 1] to features ``[N, 64]`` and logits ``[N, 10]``."""
        x = functional.silu(self.conv1(x))
        x = functional.max_pool2d(functional.silu(self.conv2(x)), 2)
        x = functional.silu(self.conv3(x))
        features = functional.silu(self.conv4(x)).mean((2, 3))
        return features, self.output(features)


class DigitsExtractor:
    """Features and logits of :class:`DigitsNetwork` with the shipped, verified weights.

    Args:
        location: a weights file other than the shipped one; its JSON lies beside it.

    Raises:
        MissingError: the weights or their JSON are not there.
        UserError: the file's hash is not the one in the JSON.
    """

    name = "digits-cnn"
    short_name = "digits"
    preprocessing = "none"
    image_shape = (1, 8, 8)
    feature_dim = FEATURE_DIM

    def __init__(self, location: Path | str | None = None) -> None:
        path = WEIGHTS if location is None else Path(location)
        self.weights_sha256 = _verified_hash(path)
        tensors, _ = read_tensors(path, KIND)
        self.network = DigitsNetwork().eval().requires_grad_(False)
        self.network.load_state_dict(tensors)
        self.device = torch.device("cpu")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of ``[N, 1, 8, 8]`` images: uint8, or float in [-1, 1]."""
        if images.dim() != 4 or images.shape[1:] != (1, 8, 8):
            raise UserError(
                "digits-cnn extractor",
                f"images of shape {tuple(images.shape)}",
                allowed="[N, 1, 8, 8]",
                remedy="this extractor is for the digits dataset only",
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
                "digits-cnn extractor",
                f"no file {needed}",
                allowed="the weights and their JSON",
                remedy="reinstall cmbench, or run benchmarks/train_digits_extractor.py",
            )
    expected = str(json.loads(facts.read_text("utf-8")).get("sha256", "none"))
    found = sha256_file(path)
    if found != expected:
        raise UserError(
            str(path),
            f"sha256 {found[:16]}… is not the recorded one",
            allowed=f"{expected[:16]}…",
            remedy="reinstall cmbench, or run benchmarks/train_digits_extractor.py",
        )
    return found
