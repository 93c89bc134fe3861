"""The parity check on files that the tests make from the official code's stored outputs."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import GOLDEN, write_edm
from safetensors.torch import load_file, save_file

from cmbench.diffusion.models import EDMConsistency
from cmbench.importers.parity import compare, read_reference, seeded_inputs
from cmbench.importers.read import read_checkpoint

Command = Callable[..., Any]
DOCS = Path(__file__).parents[2] / "docs"
PICKLED = ["edm-ddpmpp-cond", "edm-ddpmpp-uncond", "edm-ncsnpp-cond", "edm-adm-cond"]


def original(folder: Path, name: str) -> tuple[str, str]:
    """Return a checkpoint in EDM's format and the official outputs for it."""
    weights = load_file(GOLDEN / f"{name}.weights.safetensors")
    return str(write_edm(folder / f"{name}.pkl", weights)), str(GOLDEN / f"{name}.io.safetensors")


def error_of(outcome: Any) -> float:
    found = re.search(r"largest relative error (\S+) over", outcome.out)
    assert found, outcome.err
    return float(found[1])


@pytest.mark.parametrize("name", PICKLED)
def test_the_official_outputs_agree(cmbench: Command, tmp_path: Path, name: str) -> None:
    checkpoint, reference = original(tmp_path, name)
    done = cmbench("parity", checkpoint, "--reference", reference)
    assert done.code == 0, done.out
    assert done.out.startswith("out.denoised: ")
    assert done.out.endswith("at most 0.0001: agrees\n")
    assert 0 < error_of(done) < 1e-5


def test_openai_denoiser_and_consistency_function(cmbench: Command, tmp_path: Path) -> None:
    torch.save(load_file(GOLDEN / "openai-adm-cond.weights.safetensors"), tmp_path / "cd.pt")
    command = (
        "parity",
        str(tmp_path / "cd.pt"),
        "--channels-per-head",
        "16",
        "--resolution",
        "16",
        "--reference",
        str(GOLDEN / "openai-adm-cond.io.safetensors"),
    )
    done = cmbench(*command, "--sigma-min", "0.002", "--float64")
    assert done.code == 0, done.out
    assert [line.split(":")[0] for line in done.out.splitlines()] == [
        "out.denoised",
        "out.consistency",
    ]
    assert cmbench(*command).code == 2, "the boundary is not known"


@pytest.mark.parametrize("change", ["outputs", "weights", "nan"])
def test_a_difference_is_found(cmbench: Command, tmp_path: Path, change: str) -> None:
    name = "edm-ddpmpp-uncond"
    checkpoint, reference = original(tmp_path, name)
    tensors = load_file(reference)
    if change == "weights":
        weights = load_file(GOLDEN / f"{name}.weights.safetensors")
        key = "model.dec.16x16_aux_conv.bias"
        checkpoint = str(write_edm(tmp_path / "b.pkl", weights | {key: weights[key] + 0.01}))
    else:
        wrong = 1.001 if change == "outputs" else torch.nan
        tensors["out.denoised"][-1] *= wrong
    save_file(tensors, tmp_path / "r.safetensors")
    done = cmbench("parity", checkpoint, "--reference", str(tmp_path / "r.safetensors"))
    assert done.code == 1
    assert "DIFFERS" in done.out
    assert not error_of(done) < 1e-4


def test_inputs_are_seeded_and_complete(cmbench: Command, tmp_path: Path) -> None:
    checkpoint, _ = original(tmp_path, "edm-ddpmpp-uncond")
    for file, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        done = cmbench("parity", checkpoint, "--inputs", str(tmp_path / file), "--seed", seed)
        assert done.code == 0, done.err
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    inputs, other = load_file(tmp_path / "a"), load_file(tmp_path / "c")
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {
        "in.x": (8, 3, 16, 16),
        "in.sigma": (8,),
        "in.augment_labels": (8, 9),
    }
    assert not torch.equal(inputs["in.x"], other["in.x"])
    assert inputs["in.sigma"][0] == pytest.approx(0.01)
    assert inputs["in.sigma"][-1] == pytest.approx(80.0)


def test_the_whole_procedure_with_a_stand_in_for_the_official_code(tmp_path: Path) -> None:
    """Classes as indices and the raw network, as docs/parity.md writes them for diffusers."""
    checkpoint, _ = original(tmp_path, "edm-ddpmpp-cond")
    found = read_checkpoint(Path(checkpoint))
    tensors = seeded_inputs(found, 3)
    root = (tensors["in.sigma"] ** 2 + 0.25).sqrt()[:, None, None, None]
    with torch.no_grad():
        tensors["out.raw"] = found.build()(
            tensors["in.x"] / root, tensors["in.sigma"].log() / 4, tensors["in.labels"]
        )
    save_file(tensors, tmp_path / "r.safetensors")
    (agreement,) = compare(found, read_reference(tmp_path / "r.safetensors", found))
    assert (agreement.output, agreement.images) == ("out.raw", 3)
    assert agreement.error < 1e-5


def lines_of_the_documentation(word: str) -> str:
    blocks: list[str] = re.findall(
        r"```python\n(.*?)```", (DOCS / "parity.md").read_text(), re.DOTALL
    )
    (lines,) = [block for block in blocks if word in block]
    return lines


class ECMPrecond(torch.nn.Module):
    """What ECT's class does in evaluation, around a network of ours."""

    label_dim = 0

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: None,
        force_fp32: bool,
        augment_labels: torch.Tensor,
    ) -> torch.Tensor:
        model = EDMConsistency(self.network, 0.5, 0.003)
        return model(x, sigma, labels, augment_labels=augment_labels)


def test_the_lines_for_ect(
    cmbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class applies the boundary itself, so what comes out is no denoiser."""
    weights = load_file(GOLDEN / "edm-ddpmpp-uncond.weights.safetensors")
    name = "edm-cifar10-32x32-cond-vp.pkl"
    path = write_edm(tmp_path / name, weights, "ECMPrecond", sigma_min=0.003)
    network = read_checkpoint(path).build()
    monkeypatch.chdir(tmp_path)
    assert cmbench("parity", str(path), "--inputs", "inputs.safetensors").code == 0
    (tmp_path / "official").mkdir()
    with (tmp_path / "official" / name).open("wb") as file:
        pickle.dump({"ema": ECMPrecond(network)}, file)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    (tmp_path / "official" / "inputs.safetensors").symlink_to(tmp_path / "inputs.safetensors")
    lines = lines_of_the_documentation("force_fp32")
    subprocess.run([sys.executable, "-c", lines], check=True, cwd=tmp_path / "official")
    done = cmbench("parity", str(path), "--reference", "official/outputs.safetensors")
    assert done.code == 0, done.out + done.err
    assert done.out.startswith("out.consistency: ")


def test_the_attention_for_openai() -> None:
    """q, k and v first, then heads: as the class that it takes the place of."""
    lines = lines_of_the_documentation("cm.unet")
    compile(lines, "parity.md", "exec")
    attention = lines[lines.index("from torch.nn") : lines.index("cm.unet.QKVFlash")]
    namespace: dict[str, Any] = {"torch": torch}
    exec(attention, namespace)  # noqa: S102 - our own documentation
    qkv = torch.randn(2, 3 * 4 * 5, 7, dtype=torch.float64)
    q, k, v = qkv.reshape(2, 3, 4, 5, 7).unbind(1)
    weights = (torch.einsum("nhdq,nhdk->nhqk", q, k) * 5**-0.5).softmax(-1)
    expected = torch.einsum("nhqk,nhdk->nhdq", weights, v).reshape(2, 20, 7)
    assert torch.allclose(namespace["Attention"](20, 4)(qkv), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"out.denoised": None}, r"holds in.labels, in.sigma, in.x; allowed: in.x, in.sigma"),
        ({"in.x": None}, r"; make it as docs/parity.md says"),
        ({"in.x": torch.zeros(2, 3, 8, 8)}, r"in.x has shape \(2, 3, 8, 8\); allowed: \(\d, 3, 16"),
        ({"in.labels": torch.zeros(2, 4)}, r"in.labels has shape \(2, 4\)"),
        ({"in.labels": None}, r"holds no in.labels, and the network knows"),
        ({"in.labels": torch.full((4,), 999)}, r"in.labels has 999; allowed: classes from 0 to"),
        ({"in.labels": torch.tensor([0, -1, 1, 1])}, r"in.labels has -1; allowed"),
        ({"in.labels": torch.tensor([0.5, 0, 1, 1])}, r"in.labels has 0.5; allowed"),
        (
            {
                "in.x": torch.zeros(0, 3, 16, 16),
                "in.sigma": torch.zeros(0),
                "in.labels": None,
                "out.denoised": torch.zeros(0, 3, 16, 16),
            },
            r"holds no images; allowed: at least one",
        ),
        ({"in.augment_labels": torch.zeros(2, 9)}, r"no such tensor: the network takes none"),
    ],
)
def test_references_that_do_not_fit(
    cmbench: Command, tmp_path: Path, change: dict[str, torch.Tensor | None], problem: str
) -> None:
    checkpoint, reference = original(tmp_path, "edm-ddpmpp-cond")
    tensors = {**load_file(reference), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "r.safetensors")
    done = cmbench("parity", checkpoint, "--reference", str(tmp_path / "r.safetensors"))
    assert done.code == 2
    assert re.search(problem, done.err), done.err
    assert len(done.err.splitlines()) == 1


def test_it_is_told_what_to_do(cmbench: Command, tmp_path: Path) -> None:
    done = cmbench("parity", str(tmp_path / "a.pkl"))
    assert (done.code, "--inputs or --reference" in done.err) == (2, True)
    checkpoint, _ = original(tmp_path, "edm-ddpmpp-uncond")
    (tmp_path / "cut").write_bytes(b"\xff")
    for reference, code, problem in (
        ("gone", 4, "gone: does not exist"),
        ("cut", 2, "cut: truncated or corrupt safetensors"),
        (".", 2, "cannot be read"),
    ):
        done = cmbench("parity", checkpoint, "--reference", str(tmp_path / reference))
        assert (done.code, problem in done.err) == (code, True), done.err
        assert done.err.startswith("error: reference ")
        assert len(done.err.splitlines()) == 1
