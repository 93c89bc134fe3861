"""Random weights in the formats of the published files, for tests without downloads."""

from __future__ import annotations

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
