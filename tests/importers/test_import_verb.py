"""``cmbench import``: what it prints and writes; bad input is one line and nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_builders import GOLDEN, write_edm, write_pickle
from safetensors.torch import load_file, save_file

from cmbench.cli.importing import default_name
from cmbench.errors import EXIT_MISSING, EXIT_USAGE
from cmbench.importers.read import read_checkpoint
from cmbench.records.workspace import Workspace

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "edm-ddpmpp-cond.weights.safetensors")


def refused(outcome: Any, *parts: str, code: int = EXIT_USAGE) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    for part in parts:
        assert part in lines[0], lines[0]


def test_what_was_recognised_is_printed_and_kept(
    cmbench: Command, workspace: Workspace, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = write_edm(tmp_path / "edm tiny!.pkl", weights)
    done = cmbench("import", str(path))
    assert done.code == 0, done.err
    facts = json.loads((GOLDEN / "edm-ddpmpp-cond.json").read_text())
    said = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert said["format"] == "edm-pickle (EDMPrecond, ema)"
    assert said["network"].startswith("ddpmpp: ")
    assert said["parameters"] == f"{facts['parameters']:,}"
    assert said["classes"] == str(facts["label_dim"])
    assert said["parameterization"] == "edm (a denoiser), sigma_data 0.5"
    assert "-o teacher=import:edm-tiny" in done.out
    written = workspace.imported / "edm-tiny.safetensors"
    exact = read_checkpoint(path)
    ours = load_file(written)
    assert ours.keys() == exact.state.keys()
    assert all(torch.equal(ours[name], exact.state[name]) for name in ours)
    assert sorted(p.name for p in workspace.imported.iterdir()) == [
        "edm-tiny.json",
        "edm-tiny.safetensors",
    ]


def test_a_name_is_taken_once(
    cmbench: Command, workspace: Workspace, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    first = write_edm(tmp_path / "a.pkl", weights)
    name = "model.map_layer0.bias"
    second = write_edm(tmp_path / "b.pkl", weights | {name: weights[name] + 1})
    assert cmbench("import", str(first), "--to", "m").code == 0
    before = (workspace.imported / "m.safetensors").read_bytes()
    assert cmbench("import", str(first), "--to", "m").code == 0, "the same again changes nothing"
    refused(cmbench_quiet(cmbench, str(second), "--to", "m"), "is another checkpoint", "--force")
    assert (workspace.imported / "m.safetensors").read_bytes() == before
    assert cmbench("import", str(second), "--to", "m", "--force").code == 0
    assert (workspace.imported / "m.safetensors").read_bytes() != before


def cmbench_quiet(cmbench: Command, *arguments: str) -> Any:
    """Run the verb and drop what it recognised before it failed to write."""
    done = cmbench("import", *arguments)
    return type(done)(done.code, "", done.err)


def test_a_file_of_the_users_own(
    cmbench: Command, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = write_edm(tmp_path / "a.pkl", weights)
    target = tmp_path / "elsewhere" / "m.safetensors"
    done = cmbench("import", str(path), "-O", str(target))
    assert done.code == 0, done.err
    assert target.is_file()
    assert f"--checkpoint {target}" in done.out
    refused(cmbench("import", str(path), "-O", "a/b"), "name 'a/b'", ".safetensors")


def test_a_file_that_was_not_imported_is_kept(
    cmbench: Command, workspace: Workspace, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Above all the checkpoint itself, named as its own target."""
    path = tmp_path / "m.safetensors"
    save_file(weights, path)
    before = path.read_bytes()
    refused(
        cmbench_quiet(cmbench, str(path), "--to", str(path)),
        "m.safetensors already exists and was not imported",
        "--force",
    )
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.glob("m.*")) == ["m.safetensors"]
    assert cmbench("import", str(path), "--to", str(path), "--force").code == 0
    # In the workspace it is what an import left that was stopped before its manifest.
    workspace.imported.mkdir(parents=True, exist_ok=True)
    (workspace.imported / "n.safetensors").write_bytes(b"cut")
    other = write_edm(tmp_path / "a.pkl", weights)
    assert cmbench("import", str(other), "--to", "n").code == 0


def test_what_a_file_does_not_say_can_be_said(cmbench: Command, tmp_path: Path) -> None:
    path = tmp_path / "cd.pt"
    torch.save(load_file(GOLDEN / "openai-adm-cond.weights.safetensors"), path)
    shape = ("--channels-per-head", "16", "--resolution", "16")
    done = cmbench("import", str(path), *shape)
    assert "unknown: give it with --parameterization" in done.out
    assert (
        "assumed          time_factor 1000.0, attention_order q, k, v before heads (not determined"
        in done.out
    )
    assert "sample it with" not in done.out
    done = cmbench(
        "import",
        str(path),
        *shape,
        "--to",
        "b",
        "--parameterization",
        "boundary",
        "--sigma-min",
        "0.002",
    )
    assert "boundary (a consistency function), sigma_min 0.002" in done.out
    assert "teacher=" not in done.out, "a consistency function is no diffusion model"
    edm = write_edm(tmp_path / "a.pkl", load_file(GOLDEN / "edm-ddpmpp-cond.weights.safetensors"))
    refused(cmbench("import", str(edm), "--sigma-data", "1"), "--sigma-data", "the file says 0.5")
    unusable = cmbench("import", str(edm), "--sigma-min", "nan")
    assert unusable.code == EXIT_USAGE
    assert "'--sigma-min': nan is not a finite number" in unusable.err


class Runs:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.flag}",))


def test_bad_files_leave_one_line_and_nothing_else(
    cmbench: Command, workspace: Workspace, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    name = "model.dec.16x16_aux_conv.weight"
    good = write_edm(tmp_path / "good.pkl", weights).read_bytes()
    (tmp_path / "cut.pkl").write_bytes(good[: len(good) // 2])
    write_pickle(tmp_path / "hostile.pkl", {"ema": Runs(tmp_path / "owned")})
    write_edm(tmp_path / "less.pkl", {k: v for k, v in weights.items() if k != name})
    write_edm(tmp_path / "shape.pkl", weights | {name: torch.zeros(3, 16, 5, 5)})
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    for file, problem in {
        "cut.pkl": "truncated or corrupt",
        "hostile.pkl": "it was not executed",
        "less.pkl": f"missing {name}",
        "shape.pkl": f"{name} has shape (3, 16, 5, 5)",
        "other.pt": "unknown network",
    }.items():
        refused(cmbench("import", str(tmp_path / file)), problem)
    refused(cmbench("import", str(tmp_path / "gone.pkl")), "does not exist", code=EXIT_MISSING)
    assert not (tmp_path / "owned").exists()
    assert not workspace.imported.exists()


def test_a_full_disk_leaves_nothing(
    cmbench: Command,
    workspace: Workspace,
    tmp_path: Path,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_edm(tmp_path / "a.pkl", weights)

    def full(tensors: Any, target: Path) -> None:
        save_file({"x": torch.zeros(1)}, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cmbench.training.checkpoint.save_file", full)
    refused(cmbench_quiet(cmbench, str(path)), "No space left on device")
    assert list(workspace.imported.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.pkl", "a"),
        ("...", "imported"),
        ("x y/ü.pt", "imported"),
        ("b" * 60 + ".pkl", "b" * 40),
        ("checkpoint_74", "checkpoint_74"),
    ],
)
def test_default_names(file: str, name: str) -> None:
    assert default_name(Path(file)) == name


def test_names_of_wrappers_and_ignored_settings_are_printed(
    cmbench: Command, workspace: Workspace, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    save_file({f"module._orig_mod.{k}": v for k, v in weights.items()}, tmp_path / "w.safetensors")
    done = cmbench("import", str(tmp_path / "w.safetensors"))
    assert done.code == 0, done.err
    said = "module. (DistributedDataParallel), _orig_mod. (torch.compile), from the names of"
    assert f"\nstripped         {said} tensors\n" in done.out
    path = write_edm(tmp_path / "net.pkl", weights, twist=3)
    refused(
        cmbench("import", str(path)),
        "'twist' of EDMPrecond (3) is a setting that is not known here",
        "if it changes nothing that is computed, add --ignore twist",
    )
    done = cmbench("import", str(path), "--ignore", "twist")
    assert done.code == 0, done.err
    assert "\nignored          twist\n" in done.out
    manifest = json.loads((workspace.imported / "net.json").read_text())
    assert manifest["meta"]["imported"]["description"]["ignored"] == ["twist"]


def test_an_archive_of_arrays_is_called_that(cmbench: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=np.zeros(3))
    done = cmbench("import", str(tmp_path / "s.npz"))
    assert done.code == 2
    assert "an archive of arr_0.npy, not a checkpoint of torch" in done.err
