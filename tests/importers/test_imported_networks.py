"""Files of every format, made from the official weights, give the official outputs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import GOLDEN, Persistent, inert_tree, write_edm, write_pickle
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmbench.errors import UserError
from cmbench.importers.imported import ImportedNetwork
from cmbench.importers.read import read_checkpoint
from cmbench.networks.base import num_parameters
from cmbench.training.checkpoint import load_checkpoint

HERE = Path(__file__).parent / "golden"
EDM = ["ddpmpp-cond", "ddpmpp-uncond", "ncsnpp-cond", "ncsnpp-uncond", "adm-cond", "adm-uncond"]


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    return (
        load_file(GOLDEN / f"{name}.weights.safetensors"),
        load_file(GOLDEN / f"{name}.io.safetensors"),
        facts,
    )


def check_outputs(found: ImportedNetwork, io: dict[str, Tensor]) -> None:
    """Compare EDM's denoiser around the imported network with the stored output."""
    x, sigma = io["in.x"].double(), io["in.sigma"].double()[:, None, None, None]
    labels = io.get("in.labels")
    if labels is not None and labels.ndim == 2:
        labels = labels.argmax(1)
    augment = io.get("in.augment_labels")
    root = (sigma**2 + 0.25).sqrt()
    with torch.no_grad():
        raw = found.build().double()(
            x / root,
            sigma.flatten().log() / 4,
            labels,
            None if augment is None else augment.double(),
        )
    denoised = 0.25 / root**2 * x + 0.5 * sigma / root * raw
    worst = (denoised - io["out.denoised"]).abs().max() / io["out.denoised"].abs().max()
    assert worst < 2e-6


@pytest.mark.parametrize("name", EDM)
def test_edm_pickles(tmp_path: Path, name: str) -> None:
    weights, io, facts = golden(f"edm-{name}")
    path = write_edm(tmp_path / "net.pkl", weights)
    found = read_checkpoint(path)
    check_outputs(found, io)
    assert num_parameters(found.build()) == facts["parameters"]
    assert (found.format, found.parameterization, found.sigma_data) == ("edm-pickle", "edm", 0.5)
    assert found.num_classes == facts["label_dim"]
    assert found.description["class"] == "EDMPrecond"
    assert found.description["arguments"] == {"dropout": 0.13}


def edm2_heads(weights: dict[str, Tensor]) -> dict[str, int]:
    """Heads of 16 channels, by the prefix of each block with attention."""
    suffix = "attn_qkv.weight"
    return {n.removesuffix(suffix): t.shape[1] // 16 for n, t in weights.items() if suffix in n}


@pytest.mark.parametrize("name", ["edm2-cond", "edm2-uncond"])
def test_edm2_pickles(tmp_path: Path, name: str) -> None:
    weights, io, _ = golden(name)
    path = write_edm(tmp_path / "edm2.pkl", weights, "Precond", heads=edm2_heads(weights))
    found = read_checkpoint(path)
    check_outputs(found, io)
    # The head size came from the pickled blocks; shapes alone would have meant 64.
    assert found.options["channels_per_head"] == 16
    assert "channels_per_head" not in found.assumed
    assert found.assumed.keys() > {"label_balance", "clip_activations"}, "this file states neither"


def test_edm2_snapshots_in_half_precision_become_float32(tmp_path: Path) -> None:
    weights, _, _ = golden("edm2-uncond")
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    heads = edm2_heads(weights)
    found = read_checkpoint(write_edm(tmp_path / "a.pkl", half, "Precond", heads=heads))
    assert {t.dtype for t in found.state.values()} == {torch.float32}
    exact = read_checkpoint(write_edm(tmp_path / "b.pkl", weights, "Precond", heads=heads))
    assert all(torch.equal(found.state[n], exact.state[n].half().float()) for n in found.state)


def test_ect_pickles_say_their_boundary(tmp_path: Path) -> None:
    weights, io, _ = golden("edm-ddpmpp-uncond")
    loss = Persistent("ECMLoss", {"q": 2})
    path = write_edm(tmp_path / "ect.pkl", weights, "ECMPrecond", sigma_min=0.003, loss=loss)
    found = read_checkpoint(path)
    check_outputs(found, io)
    assert (found.parameterization, found.sigma_min) == ("boundary", 0.003)


def test_tcm_pickles_have_no_boundary_but_zero(tmp_path: Path) -> None:
    """Its ECMPrecond keeps ECT's sigma_min, and scales as EDM's does all the same."""
    weights, _, _ = golden("edm-ddpmpp-uncond")
    loss = Persistent("ECMLoss", {"q": 2, "boundary_prob": 0.05})
    path = write_edm(tmp_path / "tcm.pkl", weights, "ECMPrecond", sigma_min=0.003, loss=loss)
    found = read_checkpoint(path)
    assert (found.parameterization, found.sigma_min) == ("boundary", 0.0)


@pytest.mark.parametrize("name", ["edm2-uncond", "edm-ddpmpp-uncond"])
def test_the_loss_tells_a_consistency_model_in_a_denoisers_class(tmp_path: Path, name: str) -> None:
    """ECT on EDM2's network, and on EDM's own preconditioning: scaled as EDM, boundary zero."""
    weights, _, _ = golden(name)
    kind = "Precond" if name.startswith("edm2") else "EDMPrecond"
    heads = edm2_heads(weights) if name.startswith("edm2") else {}
    options: dict[str, Any] = {"heads": heads, "sigma_min": 0.002}
    plain = write_edm(tmp_path / "edm.pkl", weights, kind, **options)
    assert (read_checkpoint(plain).parameterization, read_checkpoint(plain).sigma_min) == (
        "edm",
        None,
    )
    path = write_edm(tmp_path / "ect.pkl", weights, kind, loss=Persistent("ECMLoss", {}), **options)
    found = read_checkpoint(path)
    assert (found.parameterization, found.sigma_min) == ("boundary", 0.0)
    assert read_checkpoint(path, parameterization="edm").parameterization == "edm"


def test_tcm_pickles_under_another_package_and_class(tmp_path: Path) -> None:
    weights, io, _ = golden("edm-ncsnpp-uncond")
    network = inert_tree(weights, "training.networks.TCMPrecond", sigma_data=0.5)
    path = write_pickle(
        tmp_path / "tcm.pkl",
        {"ema": network, "net": None},
        persistence="edm.torch_utils.persistence",
    )
    found = read_checkpoint(path, parameterization="edm")
    check_outputs(found, io)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    weights, io, _ = golden("edm-ddpmpp-cond")
    found = read_checkpoint(write_edm(tmp_path / "net.pkl", weights, protocol=protocol))
    check_outputs(found, io)


def test_a_pickled_network_without_a_dict(tmp_path: Path) -> None:
    weights, io, _ = golden("edm-ddpmpp-uncond")
    network = inert_tree(weights, "EDMPrecond", sigma_data=0.5)
    check_outputs(read_checkpoint(write_pickle(tmp_path / "net.pkl", network)), io)


@pytest.mark.parametrize("zipped", [True, False])
def test_openai_pt(tmp_path: Path, zipped: bool) -> None:
    weights, io, facts = golden("openai-adm-cond")
    path = tmp_path / "cd_imagenet64_l2.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path, channels_per_head=16, resolution=16)
    check_outputs(found, io)
    assert found.options["time_factor"] == 1000.0
    assert num_parameters(found.build()) == facts["parameters"]
    assert found.parameterization == ""  # a teacher or a student: the file does not say


def test_a_diffusers_folder(tmp_path: Path) -> None:
    io = load_file(GOLDEN / "diffusers-adm-cond.tensors.safetensors")
    folder = tmp_path / "pipeline" / "unet"
    folder.mkdir(parents=True)
    config = (GOLDEN / "diffusers-adm-cond.config.json").read_text()
    (folder / "config.json").write_text(config)
    model = GOLDEN / "diffusers-adm-cond.model.safetensors"
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(model.read_bytes())
    found = read_checkpoint(tmp_path / "pipeline")
    with torch.no_grad():
        raw = found.build()(io["in.x"], io["in.time"] / 1000, io["in.labels"])
    worst = (raw - io["out.raw"]).abs().max() / io["out.raw"].abs().max()
    assert worst < 5e-6
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(load_file(model), folder / "diffusion_pytorch_model.bin")
    again = read_checkpoint(folder)
    assert all(torch.equal(again.state[n], found.state[n]) for n in found.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jax_checkpoint(dtype: torch.dtype) -> None:
    pytest.importorskip("msgpack", reason="the optional package msgpack is not installed")
    io = load_file(HERE / "jax-ncsnpp.io.safetensors")
    found = read_checkpoint(HERE / "jax-ncsnpp.checkpoint", resolution=16)
    assert (found.architecture, found.options["attention_resolutions"]) == ("ncsnpp", (8,))
    with torch.no_grad():
        raw = found.build().to(dtype)(io["in.x"].to(dtype), io["in.time"].to(dtype))
    worst = (raw - io["out.raw"]).abs().max() / io["out.raw"].abs().max()
    assert worst < (3e-6 if dtype == torch.float32 else 1e-7)


def test_safetensors_under_official_names(tmp_path: Path) -> None:
    weights, io, _ = golden("edm-adm-cond")
    save_file(weights, tmp_path / "w.safetensors")
    check_outputs(read_checkpoint(tmp_path / "w.safetensors"), io)


def test_an_imported_network_is_saved_with_its_history(tmp_path: Path) -> None:
    weights, io, _ = golden("edm-ddpmpp-cond")
    found = read_checkpoint(write_edm(tmp_path / "net.pkl", weights))
    sha256 = found.save(tmp_path / "ours.safetensors")
    saved = load_checkpoint(tmp_path / "ours.safetensors")
    assert saved.sha256 == sha256
    facts = saved.meta["imported"]
    assert facts["network"] == json.loads(json.dumps(found.facts()))["network"]
    assert facts["source"]["name"] == "net.pkl"
    assert len(facts["source"]["sha256"]) == 64
    network = found.build()
    network.load_state_dict(saved.tensors)
    check_outputs(found, io)


def test_what_is_imported_no_longer_needs_its_maker(tmp_path: Path) -> None:
    # The names exist only while the file is written: pickle itself could not read it here.
    weights, _, _ = golden("edm-ddpmpp-uncond")
    path = write_edm(tmp_path / "net.pkl", weights)
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(path.read_bytes())  # noqa: S301 - our own harmless file


def test_ects_network_under_edm2s_class_must_be_explained(tmp_path: Path) -> None:
    """ECT's on EDM2's network is pickled as Precond too, without EDM2's logvar."""
    weights, _, _ = golden("edm2-cond")
    less = {k: v for k, v in weights.items() if not k.startswith("logvar_")}
    assert len(less) < len(weights)
    path = write_edm(tmp_path / "ect.pkl", less, "Precond", heads=edm2_heads(less))
    with pytest.raises(UserError, match=r"without the uncertainty .*--parameterization; ECT's are"):
        read_checkpoint(path)
    found = read_checkpoint(path, parameterization="boundary")
    assert (found.architecture, found.parameterization) == ("edm2", "boundary")
