"""diffusers' ADM folders against outputs that diffusers computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from network_cases import relative
from safetensors.torch import load_file
from torch import Tensor

from cmbench.errors import UserError
from cmbench.networks.adm_unet import ADM
from cmbench.networks.diffusers_names import recognize_diffusers, to_openai_names
from cmbench.networks.official_names import from_official

GOLDEN = Path(__file__).parents[1] / "golden" / "networks" / "diffusers-adm-cond"


def config() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(Path(f"{GOLDEN}.config.json").read_text())
    return facts


def weights() -> dict[str, Tensor]:
    return load_file(f"{GOLDEN}.model.safetensors")


def test_outputs_of_diffusers() -> None:
    state = to_openai_names(config(), weights())
    found = recognize_diffusers(config(), state)
    assert (found.network, found.data_shape, found.num_classes) == ("adm", (3, 16, 16), 4)
    assert found.assumed == {"time_factor": 1000.0}
    network = ADM(ADM.Config(**found.options), found.data_shape, found.num_classes).eval()
    network.load_state_dict(from_official(network, state, found.family))
    io = load_file(f"{GOLDEN}.tensors.safetensors")
    with torch.no_grad():
        y = network(io["in.x"], io["in.time"] / 1000.0, io["in.labels"])
    assert relative(y, io["out.raw"]) < 5e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_type": "conv"}, "downsample_type = 'conv'; allowed: 'resnet'"),
        ({"resnet_time_scale_shift": "other"}, "resnet_time_scale_shift = 'other'"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name = 'UNet2DConditionModel'"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups = None; allowed: 32"),
        ({"mid_block_type": None}, "mid_block_type = None"),
        ({"out_channels": 6}, "out_channels = 6; allowed: in_channels, 3"),
        ({"block_out_channels": [32, 48]}, r"block_out_channels = \[32, 48\]; allowed: multiples"),
        ({"time_embedding_dim": 100}, "time_embedding_dim = 100; allowed: multiples of the first"),
        ({"up_block_types": ["AttnUpBlock2D"] * 2}, "allowed: the reverse of down_block_types"),
        ({"norm_num_groups": 8}, "norm_num_groups = 8; allowed: 32"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 'DownBlock2D'; allowed"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
    ],
)
def test_other_u_nets_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_openai_names(config() | change, {})


def test_tensors_without_a_counterpart_are_named() -> None:
    with pytest.raises(UserError, match=r"tensor 'down_blocks.0.resnets.0.extra'"):
        to_openai_names(config(), {"down_blocks.0.resnets.0.extra.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"tensor 'add_embedding.linear'"):
        to_openai_names(config(), {"add_embedding.linear.weight": torch.zeros(1)})
    state = weights()
    del state["mid_block.attentions.0.to_k.weight"]
    with pytest.raises(UserError, match=r"only to_q, to_v of middle_block.1.qkv.weight"):
        to_openai_names(config(), state)
