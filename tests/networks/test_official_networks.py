"""Parity with the official networks: outputs on stored inputs, layouts and parameter counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from network_cases import official_shapes, official_state, relative
from safetensors.torch import load_file
from torch import Tensor

from cmbench.errors import UserError
from cmbench.networks.adm_unet import ADM
from cmbench.networks.base import Network, num_parameters
from cmbench.networks.edm2_unet import EDM2
from cmbench.networks.mlp import MLP
from cmbench.networks.official_names import OfficialFamily, from_official
from cmbench.networks.song_unet import DDPMPP, NCSNPP

GOLDEN = Path(__file__).parents[1] / "golden" / "networks"
SIGMA_DATA, SIGMA_MIN = 0.5, 0.002

NAMES = sorted(
    path.name.removesuffix(".io.safetensors") for path in GOLDEN.glob("*.io.safetensors")
)
LAYOUTS = sorted(path.name.removesuffix(".layout.json") for path in GOLDEN.glob("*.layout.json"))
EDM2_SIZES = {
    128: 124_713_253,
    256: 497_807_781,
    320: 777_498_085,
    384: 1_119_283_749,
    448: 1_523_164_773,
}


def common_options(facts: dict[str, Any]) -> dict[str, Any]:
    names = {
        "model_channels": "channels",
        "channel_mult": "channel_mult",
        "num_blocks": "blocks",
        "attn_resolutions": "attention_resolutions",
    }
    return {ours: facts[theirs] for theirs, ours in names.items() if theirs in facts}


def build_official(facts: dict[str, Any]) -> tuple[Network, OfficialFamily]:
    """Build the network that a golden file describes in the official code's words."""
    side = facts.get("img_resolution", facts.get("image_size"))
    classes = facts.get("label_dim", facts.get("num_classes"))
    shape = (facts.get("img_channels", 3), side, side)
    options = common_options(facts)
    if "openai" in facts["source"]:
        sides = [side // factor for factor in facts["attention_resolutions"]]
        config = ADM.Config(
            **options | {"blocks": facts["num_res_blocks"], "attention_resolutions": sides},
            channels_per_head=facts["num_head_channels"],
            time_factor=1000.0,
            min_group_channels=1,
        )
        return ADM(config, shape, classes), "openai-adm"
    if facts.get("model_type") == "SongUNet":
        cls = NCSNPP if facts["embedding_type"] == "fourier" else DDPMPP
        config_song = cls.Config(**options, augment_dim=facts.get("augment_dim", 0))
        return cls(config_song, shape, classes), "edm"
    if facts.get("model_type") == "DhariwalUNet":
        return ADM(ADM.Config(**options), shape, classes), "edm"
    config_edm2 = EDM2.Config(
        **options,
        channels_per_head=facts.get("channels_per_head", 64),
        logvar_channels=facts.get("logvar_channels", 128),
    )
    return EDM2(config_edm2, shape, classes), "edm2"


def facts_of(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((GOLDEN / name).read_text())
    return facts


def loaded(name: str) -> tuple[Network, OfficialFamily, dict[str, Tensor]]:
    network, family = build_official(facts_of(f"{name}.json"))
    weights = load_file(GOLDEN / f"{name}.weights.safetensors")
    network.load_state_dict(from_official(network, weights, family))
    return network.eval(), family, weights


def expand(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def raw_output(network: Network, io: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    x, sigma = io["in.x"].to(dtype), io["in.sigma"].to(dtype)
    labels = io.get("in.labels")
    if labels is not None and labels.ndim == 2:
        labels = labels.argmax(1)
    augment = io.get("in.augment_labels")
    c_in = (sigma**2 + SIGMA_DATA**2).rsqrt()
    with torch.no_grad():
        return network(
            expand(c_in) * x,
            sigma.log() / 4.0,
            labels,
            None if augment is None else augment.to(dtype),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_the_official_code(name: str, dtype: torch.dtype) -> None:
    """The stored outputs are float32: 2e-6 leaves room for its rounding and no more."""
    network, _, _ = loaded(name)
    network.to(dtype)
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    f = raw_output(network, io, dtype)
    x, sigma = io["in.x"].to(dtype), io["in.sigma"].to(dtype)
    c_out = sigma * SIGMA_DATA * (sigma**2 + SIGMA_DATA**2).rsqrt()
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    denoised = expand(c_skip) * x + expand(c_out) * f
    assert denoised.dtype == dtype
    assert relative(denoised, io["out.denoised"]) < 2e-6
    worst = (denoised - io["out.denoised"]).abs().max() / io["out.denoised"].abs().max()
    assert worst < 2e-6
    if "out.consistency" in io:
        c_skip = SIGMA_DATA**2 / ((sigma - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
        consistent = expand(c_skip) * x + expand(c_out * (sigma - SIGMA_MIN) / sigma) * f
        assert relative(consistent, io["out.consistency"]) < 2e-6
    if "out.logvar" in io:
        assert isinstance(network, EDM2)
        logvar = network.log_variance(sigma.log() / 4.0)
        assert relative(logvar, io["out.logvar"].flatten()) < 2e-6


def test_all_golden_files_are_here() -> None:
    assert len(NAMES) == 9
    assert len(LAYOUTS) == 6


@pytest.mark.parametrize("name", NAMES)
def test_official_weights_survive_the_round_trip(name: str) -> None:
    network, family, weights = loaded(name)
    again = official_state(network, family)
    assert set(again) == set(weights)
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert num_parameters(network) == facts_of(f"{name}.json")["parameters"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_and_parameter_counts(name: str) -> None:
    facts = facts_of(f"{name}.layout.json")
    with torch.device("meta"):
        network, family = build_official(facts)
    assert num_parameters(network) == facts["parameters"]
    expected = {key: tuple(shape) for key, (shape, _) in facts["state"].items()}
    assert official_shapes(network, family) == expected
    assert all(dtype == "float32" for _, dtype in facts["state"].values())


@pytest.mark.parametrize("channels", EDM2_SIZES)
def test_edm2_sizes(channels: int) -> None:
    with torch.device("meta"):
        network = EDM2(EDM2.Config(channels=channels, logvar_channels=128), (4, 64, 64), 1000)
    assert num_parameters(network) == EDM2_SIZES[channels]


def test_openai_weights_need_their_time_factor() -> None:
    network, _, _ = loaded("openai-adm-cond")
    assert isinstance(network, ADM)
    network.embedding.time_factor = 1.0
    io = load_file(GOLDEN / "openai-adm-cond.io.safetensors")
    reference, _, _ = loaded("openai-adm-cond")
    assert (
        relative(raw_output(network, io, torch.float32), raw_output(reference, io, torch.float32))
        > 0.01
    )


def test_missing_and_unexpected_names_are_listed() -> None:
    network, family, weights = loaded("edm2-uncond")
    weights["unet.extra"] = weights.pop("unet.out_gain")
    with pytest.raises(UserError, match=r"1 names missing and 1 unexpected: missing unet.out_gain"):
        from_official(network, weights, family)


def test_wrong_shape_is_named() -> None:
    network, family, weights = loaded("edm2-uncond")
    weights["unet.out_conv.weight"] = torch.zeros(3, 8, 3, 3)
    with pytest.raises(UserError, match=r"unet.out_conv.weight has shape \(3, 8, 3, 3\)"):
        from_official(network, weights, family)


def test_family_that_never_published_the_network() -> None:
    mlp = MLP(MLP.Config(width=8, blocks=1), (2, 1, 1), 0)
    with pytest.raises(UserError, match="no 'edm' weights for a MLP"):
        from_official(mlp, {}, "edm")
