"""diffusers' UNet2DModel folders that are ADM networks, such as its consistency models.

Their tensors are renamed to OpenAI's names, whose reader does the rest. Other diffusers U-Nets
(with convolutional resampling, as in ``google/ddpm-cifar10-32``) have no counterpart here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.networks.recognize import Recognized, recognize

#: What an ADM network's config.json must say, with diffusers' defaults for absent keys.
_REQUIRED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "_class_name": ("UNet2DModel", ("UNet2DModel",)),
    "act_fn": ("silu", ("silu",)),
    "add_attention": (True, (True,)),
    "center_input_sample": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "downsample_type": ("conv", ("resnet",)),
    "flip_sin_to_cos": (True, (True,)),
    "freq_shift": (0, (0,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "norm_eps": (1e-5, (1e-5,)),
    "norm_num_groups": (32, (32,)),
    "resnet_time_scale_shift": ("default", ("scale_shift", "default")),
    "time_embedding_type": ("positional", ("positional",)),
    "upsample_type": ("conv", ("resnet",)),
}
#: Options that are read, or that change nothing in such a network.
_READ = {
    *("attention_head_dim", "attn_norm_num_groups", "block_out_channels", "down_block_types"),
    *("in_channels", "layers_per_block", "num_class_embeds", "out_channels", "sample_size"),
    *("time_embedding_dim", "up_block_types"),
    *("downsample_padding", "dropout", "num_train_timesteps"),
}
#: Blocks of a resolution with and without attention.
_BLOCKS = {
    "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def check_diffusers_config(config: Mapping[str, Any]) -> None:
    """Raise UserError, naming the key, unless config.json describes an ADM network."""
    for key, (default, allowed) in _REQUIRED.items():
        value = config.get(key, default)
        if value not in allowed:
            raise _unsupported(f"{key} = {value!r}", " or ".join(repr(a) for a in allowed))
    for key, value in config.items():
        if key not in _REQUIRED and key not in _READ and not key.startswith("_"):
            raise _unsupported(f"{key} = {value!r}"[:100], "the options of UNet2DModel")
    _check_blocks(config)
    _check_widths(config)
    colours, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    if colours != outputs:
        raise _unsupported(f"out_channels = {outputs!r}"[:100], f"in_channels, {colours!r}"[:60])
    # Absent, the middle attention has a norm only beside blocks without scale and shift.
    adaptive = config.get("resnet_time_scale_shift") == "scale_shift"
    groups = config.get("attn_norm_num_groups")
    if groups not in ((32,) if adaptive else (32, None)):
        raise _unsupported(f"attn_norm_num_groups = {groups!r}", "32")


def _check_widths(config: Mapping[str, Any]) -> None:
    """Raise UserError unless all widths are multiples of the first, one for each resolution."""
    widths, levels = config.get("block_out_channels"), len(config["down_block_types"])
    if not isinstance(widths, list) or len(widths) != levels:
        raise _unsupported(f"block_out_channels = {widths!r}"[:100], f"a list of {levels} widths")
    embedding = config.get("time_embedding_dim")
    told = {"block_out_channels": widths, "time_embedding_dim": [embedding or 4 * widths[0]]}
    for key, values in told.items():
        if any(type(v) is not int or v < 1 or v % widths[0] for v in values):
            value = f"{key} = {config[key]!r}"[:100]
            raise _unsupported(value, f"multiples of the first width, {widths[0]}"[:60])


def _check_blocks(config: Mapping[str, Any]) -> None:
    """Raise UserError unless the blocks are ADM's, the same on the way down and up."""
    attention: dict[str, list[bool]] = {}
    for key, known in _BLOCKS.items():
        types = config.get(key)
        if not isinstance(types, list) or not types:
            raise _unsupported(f"{key} = {types!r}"[:100], "a list of block types")
        for value in types:
            if value not in known:
                raise _unsupported(f"{key} has {value!r}"[:100], " or ".join(sorted(known)))
        attention[key] = [value == known[0] for value in types]
    if attention["up_block_types"] != attention["down_block_types"][::-1]:
        shown = ", ".join(config["up_block_types"])
        raise _unsupported(f"up_block_types = {shown}"[:200], "the reverse of down_block_types")


def _integer(config: Mapping[str, Any], key: str, default: int) -> int:
    """Return a positive integer of the config; an equal pair counts as one.

    ``default`` (0: none) takes the place of an absent one and of null.
    """
    value = config.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if value is None and default:
        return default
    if type(value) is not int or value < 1:
        raise _unsupported(f"{key} = {value!r}"[:100], "a positive integer")
    return value


def _unsupported(what: str, allowed: str) -> UserError:
    return UserError(
        "diffusers U-Net",
        what,
        allowed=allowed,
        remedy="only UNet2DModel folders of ADM networks can be imported",
    )


def to_openai_names(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict under OpenAI's names, q, k and v joined.

    Raises UserError for a config that is not an ADM network or a tensor with no counterpart.
    """
    check_diffusers_config(config)
    per_level = _integer(config, "layers_per_block", 2) + 1
    result: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        place, inner = _place(module, per_level, state)
        if inner in ("to_q", "to_k", "to_v"):
            joined.setdefault(f"{place}.qkv.{part}", {})[inner] = tensor
            continue
        result[f"{place}.{part}"] = tensor
    for name, parts in joined.items():
        if len(parts) != 3:
            raise _unsupported(f"only {', '.join(sorted(parts))} of {name}", "to_q, to_k and to_v")
        result[name] = torch.cat([parts[key] for key in ("to_q", "to_k", "to_v")])
    return result


def recognize_diffusers(
    config: Mapping[str, Any], openai_state: Mapping[str, Tensor], resolution: int | None = None
) -> Recognized:
    """Return the network of a state dict that :func:`to_openai_names` renamed.

    ``resolution`` is the side of the images where the config does not tell.
    """
    per_head = _integer(config, "attention_head_dim", 8)
    if "attention_head_dim" in config and config["attention_head_dim"] is None:
        per_head = max(config["block_out_channels"])  # null is one head, however wide
    found = recognize(
        {name: tuple(tensor.shape) for name, tensor in openai_state.items()},
        channels_per_head=per_head,
        resolution=_side(config, resolution),
    )
    return found._replace(assumed={"time_factor": found.options["time_factor"]})


def _side(config: Mapping[str, Any], resolution: int | None) -> int:
    if config.get("sample_size") is None and resolution is None:
        raise UserError(
            "diffusers U-Net",
            "its config has no sample_size",
            allowed="the side of the images",
            remedy="say it with --resolution",
        )
    return _integer(config, "sample_size", resolution or 0)


def _place(module: str, per_level: int, state: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return OpenAI's module name, and the inner name where q, k or v must be joined."""
    if module in _FIXED:
        return _FIXED[module], ""
    for pattern, locate in _PLACES:
        match = re.fullmatch(pattern, module)
        if match is None:
            continue
        place = locate(match, per_level, state)
        inner = match["inner"]
        if inner in ("to_q", "to_k", "to_v"):
            return place, inner
        table = _ATTENTION if "attentions" in module else _RESNET
        if inner in table:
            return f"{place}.{table[inner]}", ""
    raise _unsupported(f"tensor {module!r}", "the tensors of an ADM network")


_Locate = Callable[[re.Match[str], int, Mapping[str, Tensor]], str]


def _down(match: re.Match[str], per_level: int, state: Mapping[str, Tensor]) -> str:
    index = 1 + int(match["level"]) * per_level
    if match["kind"] == "downsamplers":
        return f"input_blocks.{index + per_level - 1}.0"
    return f"input_blocks.{index + int(match['i'])}.{int(match['kind'] == 'attentions')}"


def _up(match: re.Match[str], per_level: int, state: Mapping[str, Tensor]) -> str:
    level = int(match["level"])
    if match["kind"] == "upsamplers":
        attention = f"up_blocks.{level}.attentions.0.to_q.weight" in state
        return f"output_blocks.{(level + 1) * per_level - 1}.{2 if attention else 1}"
    index = level * per_level + int(match["i"])
    return f"output_blocks.{index}.{int(match['kind'] == 'attentions')}"


def _middle(match: re.Match[str], per_level: int, state: Mapping[str, Tensor]) -> str:
    if match["kind"] == "attentions":
        return "middle_block.1"
    return f"middle_block.{2 * int(match['i'])}"


_TAIL = r"\.(?P<i>\d+)\.(?P<inner>.+)"
_PLACES: tuple[tuple[str, _Locate], ...] = (
    (r"down_blocks\.(?P<level>\d+)\.(?P<kind>resnets|attentions|downsamplers)" + _TAIL, _down),
    (r"up_blocks\.(?P<level>\d+)\.(?P<kind>resnets|attentions|upsamplers)" + _TAIL, _up),
    (r"mid_block\.(?P<kind>resnets|attentions)" + _TAIL, _middle),
)
