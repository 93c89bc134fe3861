"""Networks recognised from the names and shapes of official state dicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from network_cases import official_shapes
from safetensors.torch import load_file

from cmbench.errors import UserError
from cmbench.networks.base import Network, num_parameters
from cmbench.networks.catalog import NETWORKS
from cmbench.networks.official_names import from_official
from cmbench.networks.recognize import Recognized, recognize
from cmbench.plugin.specs import load_object

GOLDEN = Path(__file__).parents[1] / "golden" / "networks"
LAYOUTS = sorted(GOLDEN.glob("*.layout.json"))
WEIGHTS = sorted(GOLDEN.glob("*.weights.safetensors"))
#: What shapes cannot tell of the golden files, from their configurations.
HEADS = {"edm2": 16, "openai-adm": 16}


def build(found: Recognized) -> Network:
    cls: Any = load_object({entry.name: entry.factory for entry in NETWORKS}[found.network])
    network: Network = cls(cls.Config(**found.options), found.data_shape, found.num_classes)
    return network


def layout(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    facts = json.loads(path.read_text())
    return facts, {key: tuple(shape) for key, (shape, _) in facts["state"].items()}


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda p: p.name.split(".")[0])
def test_published_layouts(path: Path) -> None:
    facts, shapes = layout(path)
    found = recognize(shapes)
    with torch.device("meta"):
        network = build(found)
    assert official_shapes(network, found.family) == shapes
    assert num_parameters(network) == facts["parameters"]
    assert found.data_shape[1] == facts.get("img_resolution", facts.get("image_size"))
    assert found.num_classes == facts.get("label_dim", facts.get("num_classes"))


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.name.split(".")[0])
def test_golden_weights_load_into_the_recognised_network(path: Path) -> None:
    weights = load_file(path)
    name = path.name.split(".")[0]
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    head = next((v for k, v in HEADS.items() if name.startswith(k)), 64)
    shapes = {key: tuple(t.shape) for key, t in weights.items()}
    found = recognize(shapes, channels_per_head=head, resolution=16)
    network = build(found)
    network.load_state_dict(from_official(network, weights, found.family))
    assert found.data_shape == (3, 16, 16)
    assert found.num_classes == facts.get("label_dim", facts.get("num_classes"))
    assert num_parameters(network) == facts["parameters"]


def test_assumptions_are_listed() -> None:
    _, shapes = layout(GOLDEN / "openai-adm-imagenet64.layout.json")
    assumed = recognize(shapes).assumed
    assert assumed.pop("attention_order") == "q, k, v before heads"
    assert assumed == {"channels_per_head": 64, "time_factor": 1000.0, "resolution": 64}
    _, shapes = layout(GOLDEN / "edm-ddpmpp-cifar10.layout.json")
    assert recognize(shapes).assumed == {}
    _, shapes = layout(GOLDEN / "edm2-s-imagenet64.layout.json")
    assert recognize(shapes).assumed == {
        "channels_per_head": 64,
        "label_balance": 0.5,
        "concat_balance": 0.5,
        "residual_balance": 0.3,
        "attention_balance": 0.3,
        "clip_activations": 256.0,
        "filter_taps": (1, 1),
    }


def test_unknown_network() -> None:
    with pytest.raises(
        UserError, match=r"unknown network: 1 tensors, among them fc.weight; allowed"
    ):
        recognize({"fc.weight": (3, 4)})
    with pytest.raises(UserError, match="0 tensors, among them none"):
        recognize({})


def test_missing_tensor_is_named() -> None:
    _, shapes = layout(GOLDEN / "edm2-s-imagenet64.layout.json")
    del shapes["unet.emb_noise.weight"]
    with pytest.raises(UserError, match=r"tensor 'unet.emb_noise.weight' is missing; allowed"):
        recognize(shapes)


@pytest.mark.parametrize(
    ("file", "name", "shape", "message"),
    [
        ("edm-ddpmpp-cifar10", "model.enc.32x32_aux_skip.weight", (3,), "encoder_type or decoder"),
        ("openai-adm-imagenet64", "input_blocks.4.0.op.weight", (3,), "resamples by convolutions"),
        ("openai-adm-imagenet64", "out.2.weight", (6, 192, 3, 3), "learn_sigma"),
        ("openai-adm-imagenet64", "time_embed.0.weight", (768, 100), "not multiples of 100"),
        ("openai-adm-imagenet64", "output_blocks.11.1.in_layers.2.weight", (3,), "say the side"),
    ],
)
def test_variants_that_were_never_published_are_refused(
    file: str, name: str, shape: tuple[int, ...], message: str
) -> None:
    _, shapes = layout(GOLDEN / f"{file}.layout.json")
    shapes[name] = shape
    if "say" in message:  # three more resolutions than any published one
        for i in (0, 1, 2):
            shapes[f"output_blocks.{i}.1.in_layers.2.weight"] = (3,)
    with pytest.raises(UserError, match=message):
        recognize(shapes)
