"""Files that are damaged, hostile or of no known network: one line, and nothing of them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import (
    GOLDEN,
    Persistent,
    inert_tree,
    official_names,
    write_edm,
    write_pickle,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmbench.errors import EXIT_MISSING, MissingError, UserError
from cmbench.importers.read import read_checkpoint

HERE = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "edm-ddpmpp-uncond.weights.safetensors")


def refuse(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


class Runs:
    """Reduces to a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


# ---- hostile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_write_a_file(
    tmp_path: Path, weights: dict[str, Tensor], protocol: int
) -> None:
    flag = tmp_path / "owned"
    shell = Runs(os.system, f"touch {flag}")
    network = inert_tree(weights, "EDMPrecond")
    for data in (
        shell,
        {"ema": network, "loss_fn": shell},
        {"ema": Persistent("EDMPrecond", {"_parameters": {"x": shell}})},
        {"ema": Runs(eval, f"open({str(flag)!r}, 'w')")},
        {"ema": network, "extra": Runs(torch.load, str(flag))},
        {"ema": network, "extra": Runs(torch.hub.load, "owner/repo", "model")},
        {"ema": network, "extra": Runs(getattr, "text", "upper")},
        {"ema": network, "extra": nn.Linear.forward},
    ):
        path = write_pickle(tmp_path / "bad.pkl", data, protocol)
        refuse(path, r"refused: the pickle asks for [\w.]+; .*it was not executed")
        assert not flag.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_attributes_are_recorded_and_never_resolved(
    tmp_path: Path, weights: dict[str, Tensor], protocol: int
) -> None:
    """What a bound method pickles as, ``getattr(object, name)``, and what could be made of it."""
    network = inert_tree(weights, "EDMPrecond", sigma_data=0.5)
    described = Persistent("ECMLoss", {"q": 2})
    attribute = Runs(getattr, described, "__class__")
    sound = {"ema": network, "loss_fn": Persistent("EDMLoss", {"f": attribute})}
    assert (
        read_checkpoint(write_pickle(tmp_path / "net.pkl", sound, protocol)).architecture
        == "ddpmpp"
    )
    for hostile in (
        Runs(getattr, attribute, "__subclasses__"),
        Runs(getattr, Runs(getattr, described, "__init__"), "__globals__"),
        Runs(getattr, nn.Linear, "__init__"),
        Runs(getattr, {"a": 1}, "clear"),
        Runs(getattr, weights["model.map_layer0.bias"], "data"),
        Runs(getattr, described, "q", 3),
        Runs(getattr, described, b"q"),
        Runs(getattr, getattr, "__self__"),
    ):
        path = write_pickle(tmp_path / "bad.pkl", {"ema": network, "extra": hostile}, protocol)
        refuse(path, r"refused: the pickle asks for [\w.]+; .*it was not executed")


def test_a_recorded_attribute_can_neither_be_called_nor_changed(tmp_path: Path) -> None:
    def written(end: bytes) -> Path:
        with official_names():
            start = pickle.dumps(Runs(getattr, Persistent("ECMLoss", {"q": 2}), "t_to_r"), 2)
        path = tmp_path / "bad.pkl"
        path.write_bytes(start.removesuffix(b".") + end + b".")
        return path

    refuse(written(b"(K\x01tR"), "truncated or corrupt pickle .*not callable")
    refuse(written(b"}X\x05\x00\x00\x00ownerK\x01sb"), "asks for a change of an attribute")


def test_source_code_inside_a_pickle_stays_text(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    flag = tmp_path / "owned"
    network = inert_tree(weights, "EDMPrecond", sigma_data=0.5)
    network.source = f"open({str(flag)!r}, 'w').close()"
    found = read_checkpoint(write_pickle(tmp_path / "net.pkl", {"ema": network}))
    assert found.architecture == "ddpmpp"
    assert not flag.exists()


def test_a_storage_that_hides_a_pickle(tmp_path: Path) -> None:
    flag = tmp_path / "owned"
    buffer = io.BytesIO()
    torch.save(Runs(os.system, f"touch {flag}"), buffer, _use_new_zipfile_serialization=False)
    hidden = Runs(torch.storage._load_from_bytes, buffer.getvalue())
    state = {"_parameters": {"weight": hidden}, "_buffers": {}, "_modules": {}}
    path = write_pickle(tmp_path / "bad.pkl", {"ema": Persistent("EDMPrecond", state)})
    refuse(path, r"truncated or corrupt|refused")
    assert not flag.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_that_would_write_a_file(tmp_path: Path, zipped: bool) -> None:
    flag = tmp_path / "owned"
    path = tmp_path / "bad.pt"
    torch.save({"w": Runs(os.system, f"touch {flag}")}, path, _use_new_zipfile_serialization=zipped)
    refuse(path, r"refused: the pickle asks for \w+.system; .*it was not executed")
    assert not flag.exists()


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((4, 4), (4, 1), 1),
        ((2, 2), (-2, 1), 2),
        ((2,), (1,), -1),
        ((9,), (2,), 0),
        ((2, 2), (1,), 0),
        ((10**12,), (0,), 0),
    ],
)
def test_a_tensor_beyond_its_storage(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    class Tensorish:
        def __reduce__(self) -> Any:
            storage = torch.storage.TypedStorage(
                wrap_storage=torch.zeros(16).untyped_storage(), dtype=torch.float32, _internal=True
            )
            return (torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {}))

    path = write_pickle(tmp_path / "bad.pkl", {"ema": Tensorish()})
    refuse(path, r"truncated or corrupt pickle \(ValueError: a tensor|IndexError")


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=300),
    suffix=st.sampled_from([".pkl", ".pt", "", ".x"]),
    head=st.sampled_from([b"", b"\x80\x04", b"PK\x03\x04", b"\x83\xa4step"]),
)
def test_noise_is_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str, head: bytes
) -> None:
    path = tmp_path_factory.mktemp("noise") / f"file{suffix}"
    path.write_bytes(head + data)
    refuse(path, r"^checkpoint .*; ")


# ---- damaged -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.999))
def test_truncated_files_say_so(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor], share: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    small = {"input_blocks.0.0.weight": torch.zeros(3, 3)}
    torch.save(small, folder / "a.pt")
    save_file(small, folder / "a.safetensors")
    write_edm(folder / "a.pkl", dict(list(weights.items())[:4]))
    for path in (folder / "a.pt", folder / "a.safetensors", folder / "a.pkl"):
        data = path.read_bytes()
        path.write_bytes(data[: max(int(len(data) * share), 1)])
        refuse(path, r"truncated or corrupt|is of no known kind|is empty")


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"")
    refuse(tmp_path / "a.pkl", "is empty; download it again")
    refuse(tmp_path / "gone.pkl", "does not exist; give the path")
    with pytest.raises(MissingError) as caught:
        read_checkpoint(tmp_path / "gone.pkl")
    assert caught.value.exit_code == EXIT_MISSING


def test_a_missing_tensor_is_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    name = "model.dec.16x16_aux_norm.bias"
    less = {k: v for k, v in weights.items() if k != name}
    message = rf"1 names missing and 0 unexpected: missing {name}"
    refuse(write_edm(tmp_path / "a.pkl", less), message)
    more = weights | {"model.surprise.weight": torch.zeros(2)}
    refuse(write_edm(tmp_path / "b.pkl", more), r"1 unexpected: unexpected model.surprise.weight")
    del less["model.map_layer0.weight"]
    refuse(write_edm(tmp_path / "c.pkl", less), r"tensor 'model.map_layer0.weight' is missing")


def test_a_wrong_shape_is_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    name = "model.dec.16x16_aux_conv.weight"
    wrong = weights | {name: torch.zeros(3, 16, 5, 5)}
    refuse(write_edm(tmp_path / "a.pkl", wrong), rf"{name} has shape \(3, 16, 5, 5\); allowed")


def test_weights_that_are_not_finite(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    name = "model.dec.16x16_aux_conv.bias"
    wrong = weights | {name: torch.full((3,), torch.nan)}
    refuse(write_edm(tmp_path / "a.pkl", wrong), r"1 tensors are not finite, the first being")


# ---- of no known network -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_parameterizations_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], name: str
) -> None:
    path = write_edm(tmp_path / "a.pkl", weights, name)
    message = rf"wrapped as '{name}', which gives it other inputs .*cannot be imported"
    refuse(path, message)
    refuse(path, message, parameterization="edm")


def test_an_unknown_class_can_be_explained(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = write_edm(tmp_path / "a.pkl", weights, "MyPrecond")
    refuse(path, r"wrapped as 'MyPrecond', which is unknown; .*--parameterization edm or boundary")
    assert read_checkpoint(path, parameterization="boundary").parameterization == "boundary"


def test_a_part_that_is_not_there(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = write_edm(tmp_path / "a.pkl", weights)
    refuse(path, r"no network 'raw' .*; allowed: ema; choose one of them with --part", part="raw")
    path = write_pickle(tmp_path / "b.pkl", {"a": 1})
    refuse(path, r"holds no network 'ema' \(it holds a\); allowed: a pickled network")
    path = write_pickle(tmp_path / "c.pkl", [1, 2])
    refuse(path, r"holds no network 'ema' \(it holds list\)")


def test_a_state_dict_of_something_else(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt", r"a.pt: unknown network: 1 tensors, among them fc.weight")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "b.pt")
    refuse(tmp_path / "b.pt", r"holds no state dict \(it holds epoch, loss\)")
    torch.save([1], tmp_path / "c.pt")
    refuse(tmp_path / "c.pt", r"holds no state dict \(it holds list\)")


def test_a_name_that_is_not_the_contents(tmp_path: Path) -> None:
    """safetensors are known by their header, whatever the file is called."""
    weights = load_file(GOLDEN / "edm-adm-uncond.weights.safetensors")
    for name in ("a.pt", "a.pkl", "a"):
        save_file(weights, tmp_path / name)
        assert read_checkpoint(tmp_path / name).architecture == "adm"
    (tmp_path / "b.pt").write_bytes(b"no checkpoint at all")
    refuse(tmp_path / "b.pt", r"is of no known kind \(it begins with 6e 6f 20 63\)")
    (tmp_path / "b.safetensors").write_bytes(b"no checkpoint at all")
    refuse(tmp_path / "b.safetensors", r"truncated or corrupt safetensors \(")


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refuse(tmp_path / "a.pkl", r"cannot be read: Permission denied; check that")


def test_settings_that_the_file_tells_otherwise(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = write_edm(tmp_path / "a.pkl", weights)
    refuse(path, r"--resolution 32: the file says 16; leave it out", resolution=32)
    refuse(path, r"--channels-per-head 8: the file has one head; leave it", channels_per_head=8)
    assert read_checkpoint(path, resolution=16).data_shape == (3, 16, 16)


@pytest.mark.parametrize("family", ["openai-adm-cond", "edm-adm-cond", "edm2-cond"])
def test_heads_that_do_not_divide_a_width(tmp_path: Path, family: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(load_file(GOLDEN / f"{family}.weights.safetensors"), path)
    message = r"channels_per_head 5 in a block of \d+ channels; allowed: a size that divides"
    refuse(path, message, channels_per_head=5, resolution=16)


def test_an_adm_of_unknown_or_impossible_size(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(load_file(GOLDEN / "openai-adm-cond.weights.safetensors"), path)
    refuse(path, r"an ADM of 2 resolutions; .*say the side of its images with --resolution")
    refuse(path, r"resolutions for images of 17x17 pixels; allowed: multiples of 2", resolution=17)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08\x07hello")
    refuse(tmp_path / "a.onnx", r"is of no known kind \(it begins with 08 07 68 65\); allowed: EDM")
    refuse(tmp_path, r"is a folder without config.json")


def test_bad_diffusers_folders(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "diffusers-adm-cond.config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse(tmp_path, r"has a config.json but no weights; allowed: diffusion_pytorch_model.safet")
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text("{")
    refuse(tmp_path, r"config.json: is not JSON")
    (tmp_path / "config.json").write_text('{"_class_name": "VAE"}')
    refuse(tmp_path, r"config.json describes no U-Net")
    (tmp_path / "config.json").write_text(json.dumps(config | {"downsample_type": "conv"}))
    refuse(tmp_path, r"downsample_type = 'conv'; allowed: 'resnet'")


# ---- JAX ---------------------------------------------------------------------------------------


def test_bad_jax_checkpoints(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack", reason="the package msgpack is not installed")
    data = (HERE / "jax-ncsnpp.checkpoint").read_bytes()
    path = tmp_path / "checkpoint_3"
    path.write_bytes(data[:-100])
    refuse(path, r"truncated or corrupt msgpack")
    path.write_bytes(data)
    refuse(path, r"holds no parameters 'target' \(it holds .*; allowed: ema, raw", part="target")
    refuse(path, r"its network is not the published NCSN\+\+", part="raw")
    path.write_bytes(msgpack.packb({"params_ema": {"Conv_0": msgpack.ExtType(2, b"1+2j")}}))
    refuse(path, r"truncated or corrupt msgpack \(ValueError: extension type 2\)")
    array = msgpack.packb(((1,), "object", b"12345678"))
    path.write_bytes(msgpack.packb({"params_ema": {"x": msgpack.ExtType(1, array)}}))
    refuse(path, r"an array of object")


def test_the_builders_really_write_what_pickle_would_run(tmp_path: Path) -> None:
    """The hostile files of these tests are live: plain pickle does execute them."""
    flag = tmp_path / "owned"
    path = write_pickle(tmp_path / "bad.pkl", {"ema": Runs(os.system, f"touch {flag}")})
    with official_names():
        pickle.loads(path.read_bytes())  # noqa: S301 - our own harmless file
    assert flag.exists()
