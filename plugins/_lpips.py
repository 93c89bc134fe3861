"""LPIPS, the learned distance that CD and CT of 2023 were trained with.

Zhang et al. 2018, arXiv:1801.03924, version 0.1 with VGG-16: features of both images after the last
ReLU of each of five stages, normalised over channels, their squared differences weighted channel by
channel, averaged over space, summed over stages. The network is torchvision's; its weights are read
from disk and never downloaded. A model trained with it is favoured by metrics on ImageNet features:
reports mark it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.models.vgg import cfgs, make_layers

from cmbench.errors import MissingError, UserError
from cmbench.importers.torch_file import load_tensors

__all__ = ["LPIPS", "LPIPS_SIDE"]

#: Smaller images are enlarged to this side first (Song et al. 2023, official code).
LPIPS_SIDE = 224
#: Ends of the five stages in torchvision's list of VGG-16's layers.
_STAGES = (4, 9, 16, 23, 30)
_CHANNELS = (64, 128, 256, 512, 512)
#: Mean and standard deviation that the published weights were trained with, for images in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
Pooling = Literal["max", "average"]
VGG_FILE = "vgg16-397923af.pth"
HEAD_FILE = "weights-vgg16-lpips.pth"
_GET = (
    'fetch them once with `python -c "from torch_fidelity.sample_similarity_lpips import '
    "SampleSimilarityLPIPS as S; S('lpips')\"` (553 MB), or set lpips_weights to a folder that has "
    "both files; or choose metric l2, l1 or pseudo-huber"
)


class LPIPS(nn.Module):
    """``lpips(a, b)``: images ``[N, 3 or 1, H, W]`` in [-1, 1] to distances ``[N]``.

    Differentiable; parameters are frozen. Build it with :meth:`load`.
    """

    def __init__(self, pooling: Pooling = "max") -> None:
        super().__init__()
        if _counting():
            layers = list(make_layers(cfgs["D"]))  # fake tensors cannot be moved
        else:
            with torch.device("meta"):  # its weights come from a file: nothing to initialise
                layers = list(make_layers(cfgs["D"]).to_empty(device="cpu"))
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the features before are needed for the gradient
        if pooling == "average":
            layers = [nn.AvgPool2d(2) if isinstance(x, nn.MaxPool2d) else x for x in layers]
        starts = (0, *_STAGES[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(*layers[a:b]) for a, b in zip(starts, _STAGES, strict=True)
        )
        self.heads = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels in _CHANNELS)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | None = None, pooling: Pooling = "max") -> LPIPS:
        """Return the network with the published weights from ``folder`` (default: torch hub's).

        ``pooling`` is "max" as published, or "average" as openai/consistency_models has it on
        ImageNet-64 and LSUN (piq's ``replace_pooling``). On torch's fake tensors, where costs are
        counted, no file is read.

        Raises:
            MissingError: a file is not there; the message says how to get it.
            UserError: a file does not hold what it should.
        """
        place = Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints"
        network = cls(pooling)
        if _counting():
            return network
        vgg = _read(place / VGG_FILE)
        index = 0
        for stage in network.stages:
            for layer in stage:
                if isinstance(layer, nn.Conv2d):
                    _fill(place / VGG_FILE, layer.weight, vgg, f"features.{index}.weight")
                    _fill(place / VGG_FILE, layer.bias, vgg, f"features.{index}.bias")
                index += 1
        heads = _read(place / HEAD_FILE)
        for number, head in enumerate(network.heads):
            _fill(place / HEAD_FILE, head, heads, f"lin{number}.model.1.weight")
        return network

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair."""
        if self.shift.device != a.device:
            self.to(a.device)
        total = a.new_zeros(a.shape[0])
        x, y = self._prepared(a), self._prepared(b)
        for stage, head in zip(self.stages, self.heads, strict=True):
            x, y = stage(x), stage(y)
            difference = (_unit(x) - _unit(y)).square()
            total = total + (difference * head).sum(1).mean((1, 2))
        return total

    def _prepared(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise UserError(
                "metric lpips",
                f"data of {images.shape[1]} channels",
                allowed="images of 1 or 3",
                remedy="choose another metric",
            )
        if min(images.shape[2:]) < 256:
            size = (LPIPS_SIDE, LPIPS_SIDE)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return (images - self.shift) / self.scale


def _counting() -> bool:
    """Say whether tensors are fake: shapes without numbers, as ``--dry-run`` counts costs on."""
    return isinstance(torch.empty(0), FakeTensor)


def _unit(features: Tensor) -> Tensor:
    """Normalise over channels, ``f / (||f|| + 1e-10)``, with gradient zero where ``f`` is zero."""
    squared = features.square().sum(1, keepdim=True)
    norm = torch.where(squared > 0, squared, torch.ones_like(squared)).sqrt()
    return features / (torch.where(squared > 0, norm, torch.zeros_like(norm)) + 1e-10)


def _read(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors; nothing in it is executed."""
    if not path.is_file():
        raise MissingError("metric lpips", f"its weights {path} are not there", remedy=_GET)
    try:
        return load_tensors(path)
    except UserError as error:
        raise UserError(
            "metric lpips",
            f"{path} cannot be read: {error.problem}",
            allowed="a file of tensors as published",
            remedy=_GET,
        ) from error


def _fill(path: Path, parameter: Tensor, state: dict[str, Tensor], key: str) -> None:
    found = state.get(key)
    if found is None or found.shape != parameter.shape:
        raise UserError(
            "metric lpips",
            f"{path} has {key} of shape {tuple(found.shape) if found is not None else None}",
            allowed=f"shape {tuple(parameter.shape)}",
            remedy=_GET,
        )
    with torch.no_grad():
        parameter.copy_(found)
