"""Which network a state dict belongs to, read off its names and shapes alone.

What shapes cannot tell (attention head size, and OpenAI's resolution) is taken from the published
models and listed in :attr:`Recognized.assumed`, so that an importer can show it and let the user
override it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.networks.layers import BOX, filter_kernel
from cmbench.networks.official_names import OfficialFamily

Shapes = Mapping[str, tuple[int, ...]]

#: What tensors of EDM2's do not tell, at its defaults.
ASSUMED_EDM2: dict[str, Any] = {
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "residual_balance": 0.3,
    "attention_balance": 0.3,
    "clip_activations": 256.0,
    "filter_taps": BOX,
}
#: How rows of q, k and v are ordered in the published consistency models, for the reader's eye.
_OPENAI_ORDER = {"attention_order": "q, k, v before heads"}
#: OpenAI's published ADM resolutions by number of levels.
_OPENAI_SIDES = {4: 64, 5: 128, 6: 256}
_HEAD = 64


class Recognized(NamedTuple):
    """Family of names, catalogue name, options of its config, data shape and number of classes."""

    family: OfficialFamily
    network: str
    options: dict[str, Any]
    data_shape: tuple[int, int, int]
    num_classes: int
    assumed: dict[str, Any]


def recognize(
    shapes: Shapes, *, channels_per_head: int = _HEAD, resolution: int | None = None
) -> Recognized:
    """Return the network of an EDM, EDM2 or OpenAI ADM state dict.

    Raises UserError for any other, naming the first few tensors that were found.
    """
    if any(name.startswith("unet.enc.") for name in shapes):
        return _guarded(_edm2, shapes, channels_per_head)
    if any(name.startswith("model.enc.") for name in shapes):
        song = any("_aux_norm." in name for name in shapes)
        return _guarded(_song if song else _edm_adm, shapes, channels_per_head)
    if "input_blocks.0.0.weight" in shapes:
        return _guarded(_openai, shapes, channels_per_head, resolution)
    first = ", ".join(list(shapes)[:3]) or "none"
    raise UserError(
        "checkpoint",
        f"unknown network: {len(shapes)} tensors, among them {first}",
        allowed="EDM (ddpmpp, ncsnpp, adm), EDM2, OpenAI ADM",
        remedy="check that the file holds the network's own state dict (often under 'ema')",
    )


def _guarded(reader: Any, shapes: Shapes, *args: Any) -> Recognized:
    """Turn a missing tensor into an error that names it, and absurd shapes into one too."""
    try:
        result: Recognized = reader(shapes, *args)
    except KeyError as error:
        raise UserError(
            "checkpoint",
            f"tensor {error.args[0]!r} is missing",
            allowed="a complete state dict",
            remedy="download or save the file again",
        ) from None
    except (IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise unsupported(f"its tensors' shapes make no network ({error})") from None
    return result


def unsupported(
    what: str, allowed: str = "the published DDPM++, NCSN++, ADM and EDM2 networks"
) -> UserError:
    """Return the error for a variant of an architecture that has no counterpart here."""
    return UserError(
        "checkpoint",
        what,
        allowed=allowed,
        remedy="this variant of the architecture cannot be imported",
    )


def _sides(shapes: Shapes, prefix: str) -> list[int]:
    """Return the encoder's resolutions, highest first."""
    pattern = re.compile(re.escape(prefix) + r"enc\.(\d+)x\1_")
    found = {int(match.group(1)) for name in shapes if (match := pattern.match(name))}
    return sorted(found, reverse=True)


def _body(shapes: Shapes, prefix: str, width_of: str, qkv: str) -> tuple[list[int], dict[str, Any]]:
    """Return the widths by resolution, and blocks and attention as options."""
    sides = _sides(shapes, prefix)

    def block(side: int, index: int) -> str:
        return f"{prefix}enc.{side}x{side}_block{index}."

    blocks = 0
    while f"{block(sides[0], blocks)}{width_of}" in shapes:
        blocks += 1
    widths = [shapes[f"{block(side, 0)}{width_of}"][0] for side in sides]
    attention = tuple(side for side in sides if f"{block(side, 0)}{qkv}" in shapes)
    middle = f"{prefix}dec.{sides[-1]}x{sides[-1]}_in0.{qkv}" in shapes
    options = {"blocks": blocks, "attention_resolutions": attention}
    # Where a block is narrower than a head, the sources leave its attention out.
    return widths, options if middle else {**options, "middle_attention": False}


def _mult(widths: list[int], channels: int) -> tuple[int, ...]:
    if any(width % channels for width in widths):
        raise unsupported(f"channel_mult: widths {widths} are not multiples of {channels} channels")
    return tuple(width // channels for width in widths)


def _input(shapes: Shapes, prefix: str, side: int) -> tuple[int, ...]:
    return shapes[f"{prefix}enc.{side}x{side}_conv.weight"]


def _song(shapes: Shapes, channels_per_head: int) -> Recognized:
    prefix = "model."
    if any("aux_skip" in name or "aux_down" in name or "aux_up" in name for name in shapes):
        raise unsupported("encoder_type or decoder_type is 'skip'")
    side = _sides(shapes, prefix)[0]
    channels, colours = _input(shapes, prefix, side)[:2]
    widths, options = _body(shapes, prefix, "conv1.weight", "qkv.weight")
    first = f"{prefix}enc.{side}x{side}_block0."
    pyramid = any("aux_residual" in name for name in shapes)
    adaptive = shapes[f"{first}affine.weight"][0] == 2 * widths[0]
    layer0 = shapes[f"{prefix}map_layer0.weight"]
    fourier = f"{prefix}map_noise.freqs" in shapes
    options |= {
        "channels": channels,
        "channel_mult": _mult(widths, channels),
        "embedding": "fourier" if fourier else "positional",
        "noise_mult": layer0[1] // channels,
        "embedding_mult": layer0[0] // channels,
        "augment_dim": shapes.get(f"{prefix}map_augment.weight", (0, 0))[1],
        "pyramid": pyramid,
        "conditioning": "scale-shift" if adaptive else "additive",
    }
    classes = shapes.get(f"{prefix}map_label.weight", (0, 0))[1]
    network = "ncsnpp" if pyramid else "ddpmpp"
    return Recognized("edm", network, options, (colours, side, side), classes, {})


def _edm_adm(shapes: Shapes, channels_per_head: int) -> Recognized:
    prefix = "model."
    side = _sides(shapes, prefix)[0]
    widths, options = _body(shapes, prefix, "conv1.weight", "qkv.weight")
    embedding, channels = shapes[f"{prefix}map_layer0.weight"]
    assumed = {"channels_per_head": channels_per_head}
    options |= {
        "channels": channels,
        "channel_mult": _mult(widths, channels),
        "embedding_mult": embedding // channels,
        "augment_dim": shapes.get(f"{prefix}map_augment.weight", (0, 0))[1],
        **assumed,
    }
    colours = _input(shapes, prefix, side)[1]
    classes = shapes.get(f"{prefix}map_label.weight", (0, 0))[1]
    return Recognized("edm", "adm", options, (colours, side, side), classes, assumed)


def _edm2(shapes: Shapes, channels_per_head: int) -> Recognized:
    prefix = "unet."
    side = _sides(shapes, prefix)[0]
    widths, options = _body(shapes, prefix, "conv_res1.weight", "attn_qkv.weight")
    embedding, noise = shapes[f"{prefix}emb_noise.weight"]
    # Shapes do not determine the base width: one that divides all widths makes the same network.
    odd = [n for n, usual in ((noise, widths[0]), (embedding, max(widths))) if n != usual]
    channels = math.gcd(*widths, *odd)
    assumed = {"channels_per_head": channels_per_head} | ASSUMED_EDM2
    options |= {
        "channels": channels,
        "channel_mult": _mult(widths, channels),
        "logvar_channels": shapes.get("logvar_fourier.freqs", (0,))[0],
        **assumed,
    }
    if noise != widths[0]:
        options["noise_mult"] = noise // channels
    if embedding != max(widths):
        options["embedding_mult"] = embedding // channels
    colours = _input(shapes, prefix, side)[1] - 1  # one constant channel
    classes = shapes.get(f"{prefix}emb_label.weight", (0, 0))[1]
    return Recognized("edm2", "edm2", options, (colours, side, side), classes, assumed)


def _openai_sizes(shapes: Shapes, resolution: int | None) -> tuple[int, int, int]:
    """Return the number of resolutions and of blocks in each, and the side of the images."""
    outputs = {
        int(m.group(1)) for name in shapes if (m := re.match(r"output_blocks\.(\d+)\.", name))
    }
    ups = [
        name
        for name in shapes
        if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight", name)
    ]
    levels = len(ups) + 1
    blocks = len(outputs) // levels - 1
    side = resolution or _OPENAI_SIDES.get(levels)
    if side is None or side % 2 ** (levels - 1):
        told = "" if side is None else f" for images of {side}x{side} pixels"
        raise UserError(
            "checkpoint",
            f"an ADM of {levels} resolutions{told}",
            allowed=f"multiples of {2 ** (levels - 1)} pixels",
            remedy="say the side of its images with --resolution",
        )
    return levels, blocks, side


def _openai(shapes: Shapes, channels_per_head: int, resolution: int | None) -> Recognized:
    if any(".op.weight" in name or ".conv.weight" in name for name in shapes):
        raise unsupported("resblock_updown is off: this ADM resamples by convolutions")
    levels, blocks, side = _openai_sizes(shapes, resolution)
    # One stem, then per level the blocks and, but for the last, a block that halves.
    first = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
    attention = tuple(
        side >> level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shapes
    )
    embedding, channels = shapes["time_embed.0.weight"]
    colours = shapes["input_blocks.0.0.weight"][1]
    if shapes["out.2.weight"][0] != colours:
        raise unsupported("learn_sigma is on: this ADM predicts variances too")
    adaptive = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0]
    assumed: dict[str, Any] = {"channels_per_head": channels_per_head, "time_factor": 1000.0}
    options = {
        "channels": channels,
        "channel_mult": _mult(widths, channels),
        "blocks": blocks,
        "attention_resolutions": attention,
        "embedding_mult": embedding // channels,
        "conditioning": "scale-shift" if adaptive else "additive",
        "min_group_channels": 1,
        **assumed,
    }
    classes = shapes.get("label_emb.weight", (0, 0))[0]
    assumed |= _OPENAI_ORDER
    if resolution is None:
        assumed["resolution"] = side
    return Recognized("openai-adm", "adm", options, (colours, side, side), classes, assumed)


# --- filters -------------------------------------------------------------------------------------


def with_filters(found: Recognized, tensors: Mapping[str, Tensor]) -> Recognized:
    """Return the network with the taps of its resampling filters, which EDM's keep as buffers.

    Raises UserError, naming the filter, unless it is one of an even number of taps, the same
    throughout; ADM's are always (1, 1).
    """
    kernels = {n: t for n, t in tensors.items() if n.endswith(".resample_filter")}
    if found.family != "edm" or not kernels:
        return found
    first = next(iter(kernels))
    taps = filter_taps(kernels[first], first)
    for name, kernel in kernels.items():
        if filter_taps(kernel, name) != taps:
            raise unsupported(f"{name} is another filter than {first}", "one resample_filter")
    if found.network == "adm":
        if taps != BOX:
            raise unsupported(f"{first} has the taps {taps}", "(1, 1) in an ADM")
        return found
    return found._replace(options={**found.options, "filter_taps": taps})


def filter_taps(kernel: Tensor, name: str) -> tuple[float, ...]:
    """Return the taps of a separable kernel ``[1, 1, n, n]``: small whole numbers where they are.

    Raises UserError, naming ``name``, for any other kernel.
    """
    n = kernel.shape[-1]
    if kernel.shape == (1, 1, n, n) and n % 2 == 0 and bool(kernel.isfinite().all()):
        row = kernel[0, 0].double().sum(0)
        smallest = float(row[row != 0].abs().amin()) if bool(row.any()) else 1.0
        for scale in range(1, 65):
            whole = row * (scale / smallest)
            if float((whole - whole.round()).abs().max()) < 1e-4 * scale:
                row = whole.round()
                break
        taps = tuple(int(t) if t == round(t) else float(t) for t in row.tolist())
        if sum(taps) and torch.allclose(filter_kernel(taps), kernel.float(), atol=1e-6):
            return taps
    raise unsupported(
        f"{name} is not a separable filter", "an even number of taps times themselves"
    )
