"""Parameter names and shapes of the official networks, and how they map to ours.

Three families of state dicts: ``edm`` (NVlabs/edm, ``model.enc.32x32_block0...``), ``edm2``
(NVlabs/edm2, ``unet.enc...``) and ``openai-adm`` (openai/guided-diffusion and
openai/consistency_models, ``input_blocks...``). Names and shapes only, no code of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks.adm_unet import ADM
from cmbench.networks.attention import SelfAttention
from cmbench.networks.base import Network
from cmbench.networks.blocks import UNetBlock
from cmbench.networks.edm2_unet import EDM2, EDM2Block
from cmbench.networks.layers import Conv2d, Resample
from cmbench.networks.song_unet import DDPMPP, PyramidStep
from cmbench.networks.unet_body import UNetBody

OfficialFamily = Literal["edm", "edm2", "openai-adm"]
#: How an official tensor becomes ours. ``qkv-interleaved``: rows are reordered from (head, channel,
#: qkv) to (qkv, head, channel); ``constant``: a filter that ours computes.
TensorMapping = Literal["copy", "transpose", "qkv-interleaved", "constant"]


class OfficialTensor(NamedTuple):
    """The name of an official tensor, our name for it, and how one becomes the other.

    For constants our name is that of a buffer.
    """

    official: str
    ours: str
    kind: TensorMapping = "copy"
    heads: int = 1


def official_tensors(network: Network, family: OfficialFamily) -> list[OfficialTensor]:
    """Return every tensor of the official state dict of that network.

    Raises UserError if the family never published such a network.
    """
    if family == "edm" and isinstance(network, (DDPMPP, ADM)):
        return list(_edm(network))
    if family == "edm2" and isinstance(network, EDM2):
        return list(_edm2(network))
    if family == "openai-adm" and isinstance(network, ADM):
        return list(_openai(network))
    raise UserError(
        "official names",
        f"no {family!r} weights for a {type(network).__name__}",
        allowed="edm: ddpmpp, ncsnpp, adm; edm2: edm2; openai-adm: adm",
        remedy="choose the family that the file comes from",
    )


def from_official(
    network: Network, state: Mapping[str, Tensor], family: OfficialFamily
) -> dict[str, Tensor]:
    """Return our state dict from an official one; names and shapes must agree exactly."""
    own = network.state_dict()
    wanted = official_tensors(network, family)
    _check_names([e.official for e in wanted], state, family)
    result: dict[str, Tensor] = {}
    for entry in wanted:
        if entry.kind == "constant":  # told by the taps, see recognize.with_filters
            continue
        value = _to_ours(state[entry.official], entry)
        target = own[entry.ours]
        if _significant(value.shape) != _significant(target.shape):
            raise UserError(
                f"{family} weights",
                f"{entry.official} has shape {tuple(state[entry.official].shape)}",
                allowed=f"{tuple(_to_theirs(target, entry).shape)}, for {entry.ours}",
                remedy="build the network with the file's own configuration",
            )
        if not value.is_floating_point():
            raise UserError(
                f"{family} weights",
                f"{entry.official} is of {str(value.dtype).removeprefix('torch.')}",
                allowed="float32, float16, bfloat16, float64",
                remedy="quantized weights cannot be imported: get the original ones",
            )
        result[entry.ours] = value.reshape(target.shape)
    return result


def _significant(shape: torch.Size) -> tuple[int, ...]:
    """Return a shape without the kernel axes of a 1x1 convolution, which is a matrix too."""
    sides = tuple(shape)
    while len(sides) > 2 and sides[-1] == 1:
        sides = sides[:-1]
    return sides


def _check_names(wanted: list[str], state: Mapping[str, Tensor], family: OfficialFamily) -> None:
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    if missing or unexpected:
        shown = [f"missing {name}" for name in missing[:3]]
        shown += [f"unexpected {name}" for name in unexpected[:3]]
        raise UserError(
            f"{family} weights",
            f"{len(missing)} names missing and {len(unexpected)} unexpected: {', '.join(shown)}",
            allowed=f"the {len(wanted)} names of this network",
            remedy="build the network with the file's own configuration",
        )


# --- tensors -------------------------------------------------------------------------------------


def _to_ours(value: Tensor, entry: OfficialTensor) -> Tensor:
    if entry.kind == "transpose":
        return value.T
    if entry.kind == "qkv-interleaved":
        rows = value.reshape(entry.heads, -1, 3, *value.shape[1:])
        return rows.movedim(2, 0).reshape(value.shape)
    return value


def _to_theirs(value: Tensor, entry: OfficialTensor) -> Tensor:
    if entry.kind == "transpose":
        return value.T
    if entry.kind == "qkv-interleaved":
        rows = value.reshape(3, entry.heads, -1, *value.shape[1:])
        return rows.movedim(0, 2).reshape(value.shape)
    return value


# --- walks ---------------------------------------------------------------------------------------


def _affine(official: str, ours: str, module: nn.Module) -> Iterator[OfficialTensor]:
    yield OfficialTensor(f"{official}.weight", f"{ours}.weight")
    if getattr(module, "bias", None) is not None:
        yield OfficialTensor(f"{official}.bias", f"{ours}.bias")


def _edm_conv(official: str, ours: str, module: nn.Module) -> Iterator[OfficialTensor]:
    if isinstance(module, Resample):
        yield OfficialTensor(f"{official}.resample_filter", f"{ours}.kernel", "constant")
        return
    yield from _affine(official, ours, module)
    if isinstance(module, Conv2d) and module.resample is not None:
        yield OfficialTensor(f"{official}.resample_filter", f"{ours}.resample.kernel", "constant")


def _attention(
    names: tuple[str, str, str], ours: str, module: SelfAttention, kind: TensorMapping
) -> Iterator[OfficialTensor]:
    norm, qkv, proj = names
    yield from _affine(norm, f"{ours}.norm", module.norm)
    for part in ("weight", "bias"):
        yield OfficialTensor(f"{qkv}.{part}", f"{ours}.qkv.{part}", kind, module.heads)
    yield from _affine(proj, f"{ours}.proj", module.proj)


def _edm_block(official: str, ours: str, block: UNetBlock) -> Iterator[OfficialTensor]:
    yield from _affine(f"{official}.norm0", f"{ours}.norm0", block.norm0)
    yield from _edm_conv(f"{official}.conv0", f"{ours}.conv0", block.conv0)
    yield from _affine(f"{official}.affine", f"{ours}.modulation.affine", block.modulation.affine)
    yield from _affine(f"{official}.norm1", f"{ours}.modulation.norm", block.modulation.norm)
    yield from _edm_conv(f"{official}.conv1", f"{ours}.conv1", block.conv1)
    if block.skip is not None:
        yield from _edm_conv(f"{official}.skip", f"{ours}.skip", block.skip)
    if block.attention is not None:
        names = (f"{official}.norm2", f"{official}.qkv", f"{official}.proj")
        yield from _attention(names, f"{ours}.attention", block.attention, "qkv-interleaved")


def _edm_style_blocks(body: UNetBody, side: int) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (official name, our name, block) in the naming that EDM and EDM2 share."""
    levels = len(body.encoder)
    for level, stage in enumerate(body.encoder):
        res = f"{side >> level}x{side >> level}"
        if level:
            yield f"enc.{res}_down", f"downs.{level - 1}", body.downs[level - 1]
        for i, block in enumerate(cast(nn.ModuleList, stage)):
            yield f"enc.{res}_block{i}", f"encoder.{level}.{i}", block
    for i, block in enumerate(body.middle):
        yield f"dec.{res}_in{i}", f"middle.{i}", block
    for index, stage in enumerate(body.decoder):
        level = levels - 1 - index
        res = f"{side >> level}x{side >> level}"
        if index:
            yield f"dec.{res}_up", f"ups.{index - 1}", body.ups[index - 1]
        for i, block in enumerate(cast(nn.ModuleList, stage)):
            yield f"dec.{res}_block{i}", f"decoder.{index}.{i}", block


def _edm(network: DDPMPP | ADM) -> Iterator[OfficialTensor]:
    body, side, model = network.body_net, network.data_shape[1], "model"
    emb = network.embedding
    if network.config.embedding == "fourier":
        yield OfficialTensor(f"{model}.map_noise.freqs", "embedding.noise.freqs")
    for official, ours in (("map_label", "label"), ("map_augment", "augment")):
        module = getattr(emb, ours)
        if module is not None:
            yield from _affine(f"{model}.{official}", f"embedding.{ours}", module)
    for layer in ("layer0", "layer1"):
        yield from _affine(f"{model}.map_{layer}", f"embedding.{layer}", getattr(emb, layer))
    yield from _affine(f"{model}.enc.{side}x{side}_conv", "body_net.stem", body.stem)
    for level, step in enumerate(body.pyramid or ()):
        assert isinstance(step, PyramidStep)
        res = side >> (level + 1)
        name, ours = f"{model}.enc.{res}x{res}_aux_residual", f"body_net.pyramid.{level}"
        yield from _affine(name, f"{ours}.conv", step.conv)
        yield OfficialTensor(f"{name}.resample_filter", f"{ours}.down.kernel", "constant")
    for official, ours, block in _edm_style_blocks(body, side):
        assert isinstance(block, UNetBlock)
        yield from _edm_block(f"{model}.{official}", f"body_net.{ours}", block)
    song = isinstance(network, DDPMPP)
    norm, conv = ("aux_norm", "aux_conv") if song else ("out_norm", "out_conv")
    prefix = f"{model}.dec.{side}x{side}_" if song else f"{model}."
    yield from _affine(f"{prefix}{norm}", "norm_out", network.norm_out)
    yield from _affine(f"{prefix}{conv}", "conv_out", network.conv_out)


def _edm2(network: EDM2) -> Iterator[OfficialTensor]:
    body, side = network.body_net, network.data_shape[1]
    yield OfficialTensor("unet.out_gain", "gain_out")
    yield from _fourier("unet.emb_fourier", "noise")
    yield OfficialTensor("unet.emb_noise.weight", "noise_linear.weight")
    if network.label is not None:
        yield OfficialTensor("unet.emb_label.weight", "label.weight")
    yield OfficialTensor(f"unet.enc.{side}x{side}_conv.weight", "body_net.stem.weight")
    for official, ours, block in _edm_style_blocks(body, side):
        assert isinstance(block, EDM2Block)
        yield from _edm2_block(f"unet.{official}", f"body_net.{ours}", block)
    yield OfficialTensor("unet.out_conv.weight", "conv_out.weight")
    if network.logvar is not None:
        yield from _fourier("logvar_fourier", "logvar.fourier")
        yield OfficialTensor("logvar_linear.weight", "logvar.linear.weight")


def _fourier(official: str, ours: str) -> Iterator[OfficialTensor]:
    yield OfficialTensor(f"{official}.freqs", f"{ours}.freqs")
    yield OfficialTensor(f"{official}.phases", f"{ours}.phases")


def _edm2_block(official: str, ours: str, block: EDM2Block) -> Iterator[OfficialTensor]:
    yield OfficialTensor(f"{official}.emb_gain", f"{ours}.gain")
    yield OfficialTensor(f"{official}.conv_res0.weight", f"{ours}.conv0.weight")
    yield OfficialTensor(f"{official}.emb_linear.weight", f"{ours}.affine.weight")
    yield OfficialTensor(f"{official}.conv_res1.weight", f"{ours}.conv1.weight")
    if block.skip is not None:
        yield OfficialTensor(f"{official}.conv_skip.weight", f"{ours}.skip.weight")
    if block.attention is not None:
        heads, name = block.attention.heads, f"{ours}.attention"
        yield OfficialTensor(
            f"{official}.attn_qkv.weight", f"{name}.qkv.weight", "qkv-interleaved", heads
        )
        yield OfficialTensor(f"{official}.attn_proj.weight", f"{name}.proj.weight")


def _openai_block(official: str, ours: str, block: nn.Module) -> Iterator[OfficialTensor]:
    assert isinstance(block, UNetBlock)
    modulation = block.modulation
    yield from _affine(f"{official}.in_layers.0", f"{ours}.norm0", block.norm0)
    yield from _affine(f"{official}.in_layers.2", f"{ours}.conv0", block.conv0)
    yield from _affine(f"{official}.emb_layers.1", f"{ours}.modulation.affine", modulation.affine)
    yield from _affine(f"{official}.out_layers.0", f"{ours}.modulation.norm", modulation.norm)
    yield from _affine(f"{official}.out_layers.3", f"{ours}.conv1", block.conv1)
    if isinstance(block.skip, Conv2d):
        yield from _affine(f"{official}.skip_connection", f"{ours}.skip", block.skip)


def _openai_pair(official: str, ours: str, block: nn.Module) -> Iterator[OfficialTensor]:
    """A block and its attention, which are two modules in a row there."""
    assert isinstance(block, UNetBlock)
    yield from _openai_block(f"{official}.0", ours, block)
    if block.attention is not None:
        names = (f"{official}.1.norm", f"{official}.1.qkv", f"{official}.1.proj_out")
        yield from _attention(names, f"{ours}.attention", block.attention, "copy")


def _openai(network: ADM) -> Iterator[OfficialTensor]:
    body, emb = network.body_net, network.embedding
    yield from _affine("time_embed.0", "embedding.layer0", emb.layer0)
    yield from _affine("time_embed.2", "embedding.layer1", emb.layer1)
    if emb.label is not None:
        yield OfficialTensor("label_emb.weight", "embedding.label.weight", "transpose")
    yield from _affine("input_blocks.0.0", "body_net.stem", body.stem)
    index = 1
    for level, stage in enumerate(body.encoder):
        if level:
            ours = f"body_net.downs.{level - 1}"
            yield from _openai_block(f"input_blocks.{index}.0", ours, body.downs[level - 1])
            index += 1
        for i, block in enumerate(cast(nn.ModuleList, stage)):
            yield from _openai_pair(f"input_blocks.{index}", f"body_net.encoder.{level}.{i}", block)
            index += 1
    yield from _openai_pair("middle_block", "body_net.middle.0", body.middle[0])
    yield from _openai_block("middle_block.2", "body_net.middle.1", body.middle[1])
    index = 0
    for level, stage in enumerate(body.decoder):
        for i, block in enumerate(cast(nn.ModuleList, stage)):
            yield from _openai_pair(
                f"output_blocks.{index}", f"body_net.decoder.{level}.{i}", block
            )
            index += 1
        if level < len(body.ups):
            place = 2 if cast(UNetBlock, block).attention is not None else 1
            name = f"output_blocks.{index - 1}.{place}"
            yield from _openai_block(name, f"body_net.ups.{level}", body.ups[level])
    yield from _affine("out.0", "norm_out", network.norm_out)
    yield from _affine("out.2", "conv_out", network.conv_out)
