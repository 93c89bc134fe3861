"""Settings that have no counterpart here are refused by name; names of wrappers are stripped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import GOLDEN
from oracle_edm import EDMNetwork
from oracle_edm2 import EDM2Network
from oracle_parts import write_snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmbench.errors import UserError
from cmbench.importers.read import read_checkpoint


def song(**c: Any) -> EDMNetwork:
    return EDMNetwork(0, "SongUNet", **c)


def adm(**c: Any) -> EDMNetwork:
    return EDMNetwork(0, "DhariwalUNet", **{"model_channels": 64, **c})


def changed(network: Any, place: str, **values: Any) -> Any:
    """Set attributes of one part: dots between names, names of blocks after their container."""
    part = network.root
    for name in place.split(".") if place else ():
        part = part[name] if isinstance(part, torch.nn.ModuleDict) else getattr(part, name)
    for name, value in values.items():
        setattr(part, name, value)
    return network


def kernel(*taps: float) -> Tensor:
    row = torch.tensor(taps)
    return row.outer(row)[None, None] / row.sum() ** 2


def filtered(network: Any, *taps: float) -> Any:
    """Give every layer that resamples other taps than it computes with."""
    for part in network.root.modules():
        if getattr(part, "resample_filter", None) is not None:
            part.resample_filter = kernel(*taps)
    return network


DOWN, BLOCK = "model.enc.4x4_down", "model.enc.8x8_block0"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "skip_scale": (
        lambda: song(skip_scale=0.5),
        r"skip_scale is 0\.5 in model\.enc\.8x8_block0 \(",
    ),
    "skip_scale of adm": (lambda: adm(skip_scale=0.5), r"skip_scale is 0\.5 .*allowed: 1;"),
    "skip_scale of one block": (
        lambda: changed(song(), "model.dec.8x8_up", skip_scale=0.7),
        r"skip_scale is 0\.7 in model\.dec\.8x8_up \(UNetBlock\); allowed: 0\.7071",
    ),
    "eps": (lambda: song(eps=1e-5), r"eps is 1e-05 in .*\(GroupNorm\); allowed: 1e-06"),
    "eps of adm": (lambda: adm(eps=1e-6), r"eps is 1e-06 in .*; allowed: 1e-05"),
    "num_groups": (
        lambda: changed(song(), f"{BLOCK}.norm0", num_groups=2),
        r"num_groups is 2 in model\.enc\.8x8_block0\.norm0 \(GroupNorm\); allowed: 4",
    ),
    "num_heads": (lambda: song(num_heads=2), r"num_heads is 2 in .*\(UNetBlock\); allowed: 1"),
    "heads of several widths": (
        lambda: changed(adm(), "model.dec.4x4_in0", num_heads=1),
        r"num_heads is \d in .*; allowed: heads of one width throughout",
    ),
    "max_positions": (
        lambda: song(max_positions=1000),
        r"max_positions is 1000 in model\.map_noise \(PositionalEmbedding\); allowed: 10000",
    ),
    "endpoint": (
        lambda: changed(adm(), "model.map_noise", endpoint=True),
        r"endpoint is True .*; allowed: False",
    ),
    "adaptive_scale": (
        lambda: changed(song(), BLOCK, adaptive_scale=True),
        r"adaptive_scale is True .*; allowed: False",
    ),
    "resample_filter of one layer": (
        lambda: changed(song(), f"{DOWN}.conv0", resample_filter=kernel(1, 3, 3, 1)),
        r"resample_filter is another filter than model\.enc\.4x4_down\.conv0\.resample_filter",
    ),
    "resample_filter of adm": (
        lambda: filtered(adm(), 1, 3, 3, 1),
        r"resample_filter has the taps \(1, 3, 3, 1\)",
    ),
    "a filter that is not separable": (
        lambda: changed(song(), f"{DOWN}.skip", resample_filter=torch.eye(2)[None, None] / 2),
        r"4x4_down\.skip\.resample_filter is not a separable filter",
    ),
    "an odd filter": (
        lambda: changed(song(), f"{DOWN}.conv0", resample_filter=kernel(1, 2, 1)),
        r"resample_filter is not a separable filter; allowed: an even number of taps",
    ),
    "up": (lambda: changed(song(), f"{BLOCK}.conv0", up=True), r"up is True .*allowed: False"),
    "down": (lambda: changed(song(), f"{DOWN}.conv0", down=False), r"down is False .*: True"),
    "fused_resample": (
        lambda: changed(song(), f"{DOWN}.conv0", fused_resample=True),
        r"fused_resample is True .*allowed: False",
    ),
    "emb_norm": (
        lambda: song(more={"emb_norm": True}),
        r"emb_norm is True in model \(SongUNet\); allowed: False",
    ),
    "learnable": (
        lambda: changed(song(embedding_type="fourier"), "model.map_noise", learnable=True),
        r"learnable is True in model\.map_noise \(FourierEmbedding\); allowed: False",
    ),
    "unknown": (
        lambda: song(more={"surprise": 3}),
        r"'surprise' of SongUNet \(3\) is a setting that is not known .*add --ignore surprise",
    ),
    "unknown argument": (
        lambda: changed(song(), BLOCK, _init_kwargs={"twist": "yes"}),
        r"'twist' of UNetBlock \(yes\) is a setting that is not known here",
    ),
    "encoder_type": (
        lambda: changed(
            song(),
            "model",
            enc=torch.nn.ModuleDict({**song().root.model.enc, "4x4_aux_skip": adm().root}),
        ),
        r"encoder_type or decoder_type is 'skip'",
    ),
    "widths": (
        lambda: song(model_channels=6, channel_mult_noise=2),
        r"normalisation groups do not share|groups",
    ),
    "label_balance": (
        lambda: EDM2Network(0, label_balance=1.5),
        r"label_balance is 1\.5 in the network \(Precond\); allowed: a number from 0 to 1",
    ),
    "res_balance of one block": (
        lambda: changed(EDM2Network(0), "unet.dec.4x4_in1", res_balance=0.4),
        r"res_balance is 0\.4 in unet\.dec\.4x4_in1 \(Block\); allowed: one value throughout, 0\.3",
    ),
    "attn_balance": (lambda: EDM2Network(0, attn_balance=-0.1), r"attn_balance is -0\.1 in"),
    "clip_act": (lambda: EDM2Network(0, clip_act=-1), r"clip_act is -1 in .*a positive number"),
    "clip_act of one block": (
        lambda: changed(EDM2Network(0), "unet.enc.8x8_block0", clip_act=None),
        r"clip_act is None in unet\.enc\.8x8_block0 \(Block\); allowed: one value throughout",
    ),
    "an odd filter of edm2": (
        lambda: EDM2Network(0, channel_mult=[1], resample_filter=[1, 2, 1]),
        r"resample_filter is not a separable filter; allowed: an even number of taps",
    ),
    "a filter of words": (
        lambda: EDM2Network(0, channel_mult=[1], resample_filter=["a"]),
        r"resample_filter is \['a'\] in",
    ),
    "flavor": (
        lambda: changed(EDM2Network(0), "unet.enc.8x8_block0", flavor="dec"),
        r"flavor is dec in unet\.enc\.8x8_block0 \(Block\); allowed: enc",
    ),
    "resample_mode": (
        lambda: changed(EDM2Network(0), "unet.enc.8x8_block0", resample_mode="down"),
        r"resample_mode is down in .*; allowed: keep",
    ),
    "unknown in blocks": (
        lambda: EDM2Network(0, more_in_blocks={"shift": 0.1}),
        r"'shift' of Block \(0\.1\) is a setting that is not known here",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_without_a_counterpart_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    network = make()
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(write_snapshot(tmp_path / "net.pkl", network))
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_can_be_ignored(tmp_path: Path) -> None:
    network = song(more={"surprise": 3, "absent": None})
    path = write_snapshot(tmp_path / "net.pkl", network)
    found = read_checkpoint(path, ignored=("surprise",))
    assert found.description["ignored"] == ["surprise"]
    assert (
        "ignored" not in read_checkpoint(write_snapshot(tmp_path / "plain.pkl", song())).description
    )


@pytest.mark.parametrize(
    ("option", "value"), [("act_fn", "gelu"), ("surprise", 1), ("norm_num_groups", 16)]
)
def test_an_option_of_diffusers_without_a_counterpart(
    tmp_path: Path, option: str, value: Any
) -> None:
    config = json.loads((GOLDEN / "diffusers-adm-cond.config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, option: value}))
    weights = (GOLDEN / "diffusers-adm-cond.model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=rf"{option} = "):
        read_checkpoint(tmp_path)


# ---- names of wrappers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "inner", "said"),
    [
        ("module.", "", ["module"]),
        ("_orig_mod.", "", ["_orig_mod"]),
        ("module._orig_mod.", "", ["module", "_orig_mod"]),
        ("_orig_mod.module.", "", ["_orig_mod", "module"]),
        ("", "_orig_mod.", ["_orig_mod"]),
        ("module.", "_fsdp_wrapped_module.", ["module", "_fsdp_wrapped_module"]),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_of_wrappers_are_stripped_and_said(
    tmp_path: Path, prefix: str, inner: str, said: list[str], suffix: str
) -> None:
    weights = load_file(GOLDEN / "edm-ddpmpp-cond.weights.safetensors")
    named = {prefix + k.replace(".enc.", f".enc.{inner}"): v for k, v in weights.items()}
    for path, tensors in ((tmp_path / f"w{suffix}", named), (tmp_path / f"p{suffix}", weights)):
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    plain, found = (
        read_checkpoint(tmp_path / f"p{suffix}"),
        read_checkpoint(tmp_path / f"w{suffix}"),
    )
    assert found.description["stripped"] == said
    assert "stripped" not in plain.description
    assert found.state.keys() == plain.state.keys()
    assert all(torch.equal(v, plain.state[k]) for k, v in found.state.items())


def test_a_state_dict_with_and_without_a_wrapper(tmp_path: Path) -> None:
    weights = load_file(GOLDEN / "edm-ddpmpp-cond.weights.safetensors")
    both = weights | {k.replace(".enc.", ".enc._orig_mod."): v.clone() for k, v in weights.items()}
    save_file(both, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds tensors twice, with and without _orig_mod"):
        read_checkpoint(tmp_path / "w.safetensors")
