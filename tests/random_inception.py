"""Random weights in the formats of the published files, for tests without downloads."""

from __future__ import annotations

import warnings
from pathlib import Path
from unittest import mock

import torch
from torch import nn


def random_state() -> dict[str, torch.Tensor]:
    """Return a random state dict of torch-fidelity's Inception with lively features."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    generator = torch.Generator().manual_seed(7)
    cls = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(cls, "load_state_dict", return_value=None),
    ):
        network = cls("inception-v3-compat", ["2048"])
    for block in network.modules():
        if isinstance(block, module.BasicConv2d):
            nn.init.kaiming_normal_(block.conv.weight, generator=generator)
            norm = block.bn
            norm.running_mean.normal_(0, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            norm.weight.data.uniform_(0.8, 1.2, generator=generator)
            norm.bias.data.normal_(0, 0.2, generator=generator)
    nn.init.normal_(network.fc.weight, 0, 0.05, generator=generator)
    return dict(network.state_dict())


def write_random_weights(path: Path) -> Path:
    """Write the state dict as torch-fidelity's file is written."""
    torch.save(random_state(), path)
    return path


class _Layers(nn.Module):
    """The network after the resize, with the name that NVIDIA's file gives it."""

    def __init__(self, library: nn.Module) -> None:
        super().__init__()
        names = (
            "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 "
            "MaxPool_2 Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e "
            "Mixed_7a Mixed_7b Mixed_7c AvgPool"
        )
        self.steps = nn.Sequential(*(library.get_submodule(name) for name in names.split()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.steps(x).flatten(1)


class _Detector(nn.Module):
    """NVIDIA's interface: pixels of any size in, TF1 bilinear inside."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = img.float()
        for dim in (2, 3):
            size = x.shape[dim]
            position = torch.arange(299, dtype=torch.float32) * (size / 299.0)
            low = position.long()
            high = (low + 1).clamp(max=size - 1)
            weight = position - low.float()
            weight = weight.view(-1, 1) if dim == 2 else weight.view(1, -1)
            first = x.index_select(dim, low)
            x = first + (x.index_select(dim, high) - first) * weight
        return self.layers((x - 128.0) / 128.0)


def write_random_torchscript(weights: Path, path: Path) -> Path:
    """Write the network of ``weights`` behind the interface of NVIDIA's TorchScript file."""
    from cmbench.metrics.inception import load_library_network

    layers = _Layers(load_library_network(weights, ("2048",))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layers, torch.zeros(1, 3, 299, 299))
        torch.jit.script(_Detector(traced)).save(str(path))
    return path
