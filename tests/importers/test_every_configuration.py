"""Fresh random networks in many configurations: imported, they compute what their source does.

The sources are written once more in ``oracle_*.py`` (checked here against the official outputs), or
are diffusers' own. What cannot be imported is refused by the setting's name.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import GOLDEN, write_pickle
from oracle_edm import EDMNetwork, FlaxTree
from oracle_edm2 import EDM2Network
from oracle_openai import OpenAINetwork
from oracle_parts import ECMLoss, write_snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmbench.diffusion.models import EDMConsistency
from cmbench.importers.imported import ImportedNetwork
from cmbench.importers.read import read_checkpoint

#: Configurations of each family.
SEEDS = range(32)
#: Largest relative error against the source, both in float64 (frequencies are float32 constants).
AGREES = 2e-6


def inputs(
    seed: int, channels: int, side: int, classes: int = 0, augment: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return images, noise levels, one-hot labels (the last without a class), augment labels."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([0.02, 0.4, 3.0, 60.0], dtype=torch.float64)
    x = torch.randn(4, channels, side, side, generator=generator, dtype=torch.float64)
    x = x * (0.25 + sigma**2).sqrt()[:, None, None, None]
    labels = None
    if classes:
        labels = torch.eye(classes, dtype=torch.float64)[[0, classes - 1, classes // 2, 0]]
        labels[3] = 0
    aug = torch.randn(4, augment, generator=generator, dtype=torch.float64) if augment else None
    return x, sigma, labels, aug


def indices(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else torch.where(labels.any(1), labels.argmax(1), -1)


def denoised(
    found: ImportedNetwork, x: Tensor, sigma: Tensor, labels: Tensor | None, augment: Tensor | None
) -> Tensor:
    """What the imported network makes of it, under the preconditioning that the file told."""
    assert found.sigma_data is not None
    low = found.sigma_min if found.parameterization == "boundary" else 0.0
    assert low is not None
    model = EDMConsistency(found.build().double(), found.sigma_data, low)
    extra = {} if augment is None else {"augment_labels": augment}
    with torch.no_grad():
        return model(x, sigma, indices(labels), **extra)


def worst(ours: Tensor, theirs: Tensor) -> float:
    error = (ours - theirs).flatten(1).abs().amax(1) / theirs.flatten(1).abs().amax(1)
    return float(error.max())


def check(network: Any, path: Path, seed: int, **more: Any) -> ImportedNetwork:
    """Import a pickled network and compare its outputs with the source's."""
    found = read_checkpoint(write_snapshot(path, network, **more))
    c = network.c
    given = inputs(
        seed, c["img_channels"], c["img_resolution"], c["label_dim"], c.get("augment_dim", 0)
    )
    with torch.no_grad():
        theirs = network.denoised(*given)
    assert float(theirs.std()) > 0.05
    assert worst(denoised(found, *given), theirs) < AGREES, c
    return found


# ---- the sources ---------------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    weights = load_file(GOLDEN / f"{name}.weights.safetensors")
    return weights, load_file(GOLDEN / f"{name}.io.safetensors"), facts


@pytest.mark.parametrize(
    "name",
    [f"edm-{net}-{c}" for net in ("ddpmpp", "ncsnpp", "adm") for c in ("cond", "uncond")]
    + ["edm2-cond", "edm2-uncond"],
)
def test_the_oracles_compute_the_official_outputs(name: str) -> None:
    weights, io, facts = golden(name)
    augment = io.get("in.augment_labels")
    network: Any
    if name.startswith("edm2"):
        names = {*EDM2Network(0).c}
        network = EDM2Network(0, **{k: v for k, v in facts.items() if k in names})
    else:
        kind, names = facts["model_type"], {*EDMNetwork(0, "SongUNet").c} - {"augment_dim"}
        wide = weights["model.map_layer0.weight"].shape[0] // facts["model_channels"]
        network = EDMNetwork(
            0,
            kind,
            **{k: v for k, v in facts.items() if k in names},
            channel_mult_emb=wide,
            augment_dim=0 if augment is None else augment.shape[1],
        )
    network.root.load_state_dict(weights)
    network.root.double()
    labels = io.get("in.labels")
    if labels is not None and labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels.long(), facts["label_dim"])
    doubled = [None if t is None else t.double() for t in (labels, augment)]
    with torch.no_grad():
        ours = network.denoised(io["in.x"].double(), io["in.sigma"].double(), *doubled)
    assert worst(ours, io["out.denoised"]) < AGREES


def test_the_oracle_of_openais_network_computes_the_official_outputs() -> None:
    weights, io, _ = golden("openai-adm-cond")
    network = OpenAINetwork(0, num_classes=10)
    assert {k: v.shape for k, v in network.state.items()} == {
        k: v.shape for k, v in weights.items()
    }
    network.state = {k: v.double() for k, v in weights.items()}
    x, sigma = io["in.x"].double(), io["in.sigma"].double()[:, None, None, None]
    root = (sigma**2 + 0.25).sqrt()
    raw = network.raw(x / root, 250 * sigma.flatten().log(), io["in.labels"])
    assert worst(0.25 / root**2 * x + 0.5 * sigma / root * raw, io["out.denoised"]) < AGREES


# ---- EDM -----------------------------------------------------------------------------------------

#: Resampling filters that the sources allow: even numbers of taps, not all of them symmetric.
TAPS = (
    [1, 1],
    [1, 3, 3, 1],
    [1, 2, 3, 3, 2, 1],
    [2, 2],
    [1, 3],
    [-1, 4, 4, -1],
    [0.5, 1.2, 1.1, 0.4],
)


def edm_configuration(seed: int, kind: str) -> dict[str, Any]:
    """A legal configuration; each setting that a file can tell varies."""
    r = random.Random(seed)
    song = kind == "SongUNet"
    levels = r.choice([1, 2, 2, 3])
    side = r.choice([8, 12, 16])
    # Multiples of 4 below 128 make whole groups; DhariwalUNet's heads have 64 channels each.
    base = r.choice([8, 12, 16, 20, 28] if song else [16, 32, 64, 96])
    c: dict[str, Any] = {
        "img_resolution": side,
        "img_channels": r.choice([1, 3, 4]),
        "label_dim": r.choice([0, 0, 5]),
        "augment_dim": r.choice([0, 0, 9]),
        "model_channels": base,
        # Two skips of the widest level must share their groups too.
        "channel_mult": [
            r.choice([1, 2, 3] if song and base < 28 else [1, 2]) for _ in range(levels)
        ],
        "channel_mult_emb": r.choice([1, 2, 4]),
        "num_blocks": r.choice([1, 1, 2]),
        "attn_resolutions": r.sample([side >> level for level in range(levels)], r.choice([0, 1])),
        "sigma_data": r.choice([0.5, 0.5, 0.7]),
    }
    if song:
        c |= {
            "channel_mult_noise": r.choice([1, 2]),
            "embedding_type": r.choice(["positional", "fourier"]),
            "encoder_type": r.choice(["standard", "residual"]),
            "resample_filter": TAPS[seed % len(TAPS)],
            "adaptive_scale": r.choice([False, False, True]),
        }
    return c


@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize("seed", SEEDS)
def test_edm(tmp_path: Path, seed: int, kind: str) -> None:
    network = EDMNetwork(seed, kind, **edm_configuration(seed, kind))
    found = check(network, tmp_path / "net.pkl", seed)
    assert found.assumed == {}
    assert (found.parameterization, found.sigma_data) == ("edm", network.c["sigma_data"])
    check_state_dict(network, tmp_path / "net.safetensors", found)


def check_state_dict(network: Any, path: Path, whole: ImportedNetwork) -> None:
    """Import the state dict alone, as safetensors; it tells all but what is said to be assumed."""
    state = {k: v.float().contiguous() for k, v in network.root.state_dict().items()}
    save_file(state, path)
    found = read_checkpoint(path)
    assert found.state.keys() == whole.state.keys()
    assert all(torch.equal(found.state[k], v) for k, v in whole.state.items())
    told = found.options.keys() - found.assumed.keys()
    assert {k: found.options[k] for k in told} == {k: whole.options[k] for k in told}


def check_consistency(
    network: Any, path: Path, seed: int, boundary: float, loss: ECMLoss
) -> ImportedNetwork:
    """Import a snapshot of ECT's loop, whose loss holds bound methods, and compare outputs."""
    c = network.c
    network.root.float()
    data = {"ema": network.root, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {}}
    write_pickle(path, data, (2, 4)[seed % 2])
    network.root.double()
    found = read_checkpoint(path)
    assert (found.parameterization, found.sigma_min) == ("boundary", boundary)
    network.c = {**c, "sigma_min": boundary}
    given = inputs(
        seed, c["img_channels"], c["img_resolution"], c["label_dim"], c.get("augment_dim", 0)
    )
    with torch.no_grad():
        theirs = network.denoised(*given)
    assert float(theirs.std()) > 0.05
    assert worst(denoised(found, *given), theirs) < AGREES, c
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_ect(tmp_path: Path, seed: int) -> None:
    kind = ("SongUNet", "DhariwalUNet")[seed % 3 == 2]
    c = edm_configuration(seed, kind) | {"sigma_min": (0.003, 0.002, 0.01)[seed % 3]}
    network = EDMNetwork(seed, kind, precond="ECMPrecond", **c)
    check_consistency(network, tmp_path / "snapshot.pkl", seed, c["sigma_min"], ECMLoss())


@pytest.mark.parametrize("seed", SEEDS)
def test_tcm(tmp_path: Path, seed: int) -> None:
    """Its class keeps ECT's ``sigma_min``, and scales as EDM's: its boundary is zero."""
    kind = ("SongUNet", "DhariwalUNet")[seed % 3 == 2]
    c = edm_configuration(seed + 100, kind) | {"sigma_min": 0.003}
    network = EDMNetwork(seed + 100, kind, precond="ECMPrecond", **c)
    loss = ECMLoss(boundary_prob=0.25)
    check_consistency(network, tmp_path / "snapshot.pkl", seed, 0.0, loss)


@pytest.mark.parametrize("seed", SEEDS)
def test_ect_on_edm2s_network(tmp_path: Path, seed: int) -> None:
    """EDM2's class without its uncertainty; EDM's scalings have their boundary at zero."""
    network = EDM2Network(seed, **edm2_configuration(seed + 100), logvar_channels=0)
    check_consistency(network, tmp_path / "snapshot.pkl", seed, 0.0, ECMLoss())


# ---- EDM2 ----------------------------------------------------------------------------------------


def edm2_configuration(seed: int) -> dict[str, Any]:
    r = random.Random(seed)
    levels, side = r.choice([1, 2, 2, 3]), r.choice([8, 12, 16])
    head = r.choice([8, 16, 64])
    return {
        "img_resolution": side,
        "img_channels": r.choice([1, 3, 4]),
        "label_dim": r.choice([0, 5]),
        "model_channels": r.choice([8, 16, 24, 7] if head != 8 else [8, 16, 24]),
        "channel_mult": [r.choice([1, 2, 3]) for _ in range(levels)],
        "channel_mult_noise": r.choice([None, None, 1, 2]),
        "channel_mult_emb": r.choice([None, None, 1, 4]),
        "num_blocks": r.choice([1, 1, 2]),
        "attn_resolutions": r.sample([side >> level for level in range(levels)], r.choice([0, 1])),
        "channels_per_head": head,
        "label_balance": r.choice([0.5, 0.3, 0.8]),
        "concat_balance": r.choice([0.5, 0.4]),
        "res_balance": r.choice([0.3, 0.5, 0.1]),
        "attn_balance": r.choice([0.3, 0.6]),
        "clip_act": r.choice([256, 0.8, None]),
        "resample_filter": TAPS[seed % len(TAPS)],
        "sigma_data": r.choice([0.5, 0.5, 0.7]),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_edm2(tmp_path: Path, seed: int) -> None:
    network = EDM2Network(seed, **edm2_configuration(seed))
    found = check(network, tmp_path / "net.pkl", seed)
    assert found.assumed == {}
    assert found.parameterization == "edm"
    check_state_dict(network, tmp_path / "net.safetensors", found)


# ---- OpenAI, diffusers, JAX ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_openai(tmp_path: Path, seed: int) -> None:
    r = random.Random(seed)
    levels, head = r.choice([1, 2, 2, 3]), r.choice([16, 32])
    side = r.choice([8, 16])
    network = OpenAINetwork(
        seed,
        image_size=side,
        model_channels=r.choice([32, 64]),
        channel_mult=[r.choice([1, 2]) for _ in range(levels)],
        num_res_blocks=r.choice([1, 2]),
        attention_sides=r.sample([side >> level for level in range(levels)], r.choice([0, 1])),
        num_head_channels=head,
        use_scale_shift_norm=r.choice([True, False]),
        num_classes=r.choice([0, 5]),
    )
    state = {k: v.float() for k, v in network.state.items()}
    torch.save(state, tmp_path / "net.pt")
    found = read_checkpoint(tmp_path / "net.pt", channels_per_head=head, resolution=side)
    x, sigma, labels, _ = inputs(seed, 3, side, network.c["num_classes"])
    x, sigma = x[:3], sigma[:3]  # every image has a class there
    index = indices(labels[:3]) if labels is not None else None
    with torch.no_grad():
        raw = found.build().double()(x, sigma.log() / 4, index)
        theirs = network.raw(x, 250 * sigma.log(), index)
    assert worst(raw, theirs) < AGREES
    assert {"time_factor", "attention_order"} <= found.assumed.keys()


@pytest.mark.parametrize("seed", SEEDS)
def test_diffusers(tmp_path: Path, seed: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is missing")
    r = random.Random(seed)
    levels, base = r.choice([1, 2, 2, 3]), r.choice([32, 64])
    side, classes = r.choice([8, 16]), r.choice([None, 5])
    attention = [r.random() < 0.4 for _ in range(levels)]
    torch.manual_seed(seed)
    adaptive = r.choice(["scale_shift", "default"])
    model = diffusers.UNet2DModel(
        sample_size=side,
        in_channels=(colours := r.choice([1, 3])),
        out_channels=colours,
        layers_per_block=r.choice([1, 2]),
        block_out_channels=tuple(base * r.choice([1, 2]) if i else base for i in range(levels)),
        down_block_types=tuple(
            "AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attention
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attention[::-1]
        ),
        attention_head_dim=r.choice([8, 16, 32, None]),
        attn_norm_num_groups=32 if adaptive == "scale_shift" else r.choice([32, None]),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift=adaptive,
        num_class_embeds=classes,
        time_embedding_dim=r.choice([None, 2 * base]),
        dropout=r.choice([0.0, 0.1]),
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "unet")
    found = read_checkpoint(tmp_path / "unet")
    x, sigma, labels, _ = inputs(seed, colours, side, classes or 0)
    x, sigma = x[:3].float(), sigma[:3].float()
    index = indices(labels[:3]) if labels is not None else None
    with torch.no_grad():
        theirs = model(x, 250 * sigma.log(), class_labels=index).sample
        ours = found.build()(x, sigma.log() / 4, index)
    assert worst(ours, theirs) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_jax(tmp_path: Path, seed: int) -> None:
    msgpack = pytest.importorskip("msgpack", reason="the optional package msgpack is missing")
    r = random.Random(seed)
    side, levels = r.choice([8, 16]), r.choice([2, 2, 3])
    network = EDMNetwork(
        seed,
        "SongUNet",
        img_resolution=side,
        img_channels=r.choice([1, 3]),
        model_channels=r.choice([8, 12, 16]),
        channel_mult=[r.choice([1, 2]) for _ in range(levels)],
        channel_mult_noise=2,
        channel_mult_emb=4,
        num_blocks=r.choice([1, 2]),
        # Counts cannot tell which level has attention: the published networks' second one has.
        attn_resolutions=r.choice([[], [side // 2]]),
        embedding_type="fourier",
        encoder_type="residual",
        resample_filter=[1, 3, 3, 1],
    )

    def packed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: packed(v) for k, v in value.items()}
        content = msgpack.packb((value.shape, value.dtype.name, value.tobytes()))
        return msgpack.ExtType(1, content)

    tree = {"step": 7, "params_ema": packed(FlaxTree(network).tree)}
    (tmp_path / "checkpoint_7").write_bytes(msgpack.packb(tree))
    found = read_checkpoint(tmp_path / "checkpoint_7", resolution=side)
    x, sigma, _, _ = inputs(seed, network.c["img_channels"], side)
    with torch.no_grad():
        theirs = network.raw(x, sigma.log() / 4, None, None)
        ours = found.build().double()(x, sigma.log() / 4)
    assert worst(ours, theirs) < AGREES
