"""The extractors whose weights ship with the package: small classifiers of digits and of CIFAR.

Each has its weights in ``weights/<name>.safetensors`` and, in the JSON beside them, their hash and
the accuracy that the training script measured. Distances on their features are called ``fd-digits``
and ``fd-cifar-cnn``: they compare with nothing but themselves and are never called FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmbench.errors import MissingError, UserError
from cmbench.files import read_json, reading, sha256_file
from cmbench.metrics._files import read_tensors
from cmbench.metrics.extractor import Features
from cmbench.metrics.precision import exact_float32
from cmbench.metrics.quantize import to_float255
from cmbench.metrics.weight_files import weights_folder

SHIPPED = Path(__file__).parent / "weights"
#: Per-channel mean and spread that centre the CIFAR network's input, in [-1, 1]; rounded, and part
#: of the network.
_MEAN, _STD = (-0.02, -0.04, -0.11), (0.49, 0.49, 0.52)


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
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[N, 1, 8, 8]`` in [-1, 1] to features ``[N, 64]`` and logits ``[N, 10]``."""
        x = functional.silu(self.conv1(x))
        x = functional.max_pool2d(functional.silu(self.conv2(x)), 2)
        x = functional.silu(self.conv3(x))
        features = functional.silu(self.conv4(x)).mean((2, 3))
        return features, self.output(features)


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
            ResidualBlock(128, 256, 2),
        )
        self.output = nn.Linear(256, classes)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[N, 3, 32, 32]`` in [-1, 1] to features ``[N, 256]`` and logits ``[N, 10]``."""
        h = functional.silu(self.norm(self.stem((x - self.mean) / self.std)))
        features = self.blocks(h).mean((2, 3))
        return features, self.output(features)


class ShippedExtractor:
    """Features and logits of a small classifier with the shipped, verified weights.

    Args:
        location: a weights file other than the shipped one; its JSON lies beside it.

    Raises:
        MissingError: the weights or their JSON do not exist.
        UserError: the file's hash is not the one in the JSON.
    """

    name: str
    short_name: str
    preprocessing = "none"
    image_shape: tuple[int, int, int]
    feature_dim: int
    network_type: ClassVar[type[nn.Module]]
    #: What makes the weights, for the remedies of errors.
    script: ClassVar[str]

    def __init__(self, location: Path | str | None = None) -> None:
        path = self._default_path() if location is None else Path(location)
        self.weights_sha256 = self._verified_hash(path)
        tensors, _ = read_tensors(path, self.name)
        self.network = self.network_type().eval().requires_grad_(False)
        # Convolutions may be stored in bfloat16, the precision that they were trained in.
        kept = self.network.state_dict()
        self.network.load_state_dict({k: v.to(kept[k].dtype) for k, v in tensors.items()})
        self.device = torch.device("cpu")

    def _default_path(self) -> Path:
        shipped = SHIPPED / f"{self.name}.safetensors"
        own = weights_folder() / shipped.name  # trained by the user, where none are shipped
        return shipped if shipped.is_file() or not own.is_file() else own

    def _verified_hash(self, path: Path) -> str:
        facts = path.with_suffix(".json")
        remedy = f"reinstall cmbench, or run {self.script}"
        for needed in (path, facts):
            if not needed.is_file():
                raise MissingError(
                    f"{self.name} extractor",
                    f"no file {needed}",
                    allowed="the weights and their JSON",
                    remedy=remedy,
                )
        with reading(f"{self.name} extractor, {facts}", remedy):
            expected, found = str(read_json(facts)["sha256"]), sha256_file(path)
        if found != expected:
            raise UserError(
                str(path),
                f"sha256 {found[:16]}… is not the recorded one",
                allowed=f"{expected[:16]}…",
                remedy=remedy,
            )
        return found

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of ``[N, *image_shape]`` images: uint8, or float in [-1, 1]."""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
                f"{self.name} extractor",
                f"images of shape {tuple(images.shape)}",
                allowed=f"[N, {', '.join(map(str, self.image_shape))}]",
                remedy="choose an extractor for images of this size",
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


class DigitsExtractor(ShippedExtractor):
    """The extractor of the ``digits`` benchmark, for 8x8 grey digits."""

    name = "digits-cnn"
    short_name = "digits"
    image_shape = (1, 8, 8)
    feature_dim = 64
    network_type = DigitsNetwork
    script = "benchmarks/train_digits_extractor.py"


class CifarExtractor(ShippedExtractor):
    """The extractor of the ``cifar10-jpeg`` benchmark, for 32x32 colour images."""

    name = "cifar-cnn"
    short_name = "cifar-cnn"
    image_shape = (3, 32, 32)
    feature_dim = 256
    network_type = CifarNetwork
    script = "benchmarks/train_cifar_extractor.py --source ARCHIVE"
