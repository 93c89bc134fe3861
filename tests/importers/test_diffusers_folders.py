"""U-Nets that diffusers built and saved: imported, compared with its outputs, sampled, distilled.

Without diffusers these are skipped; ``test_diffusers_names.py`` has outputs that it computed once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmbench.importers.read import read_checkpoint
from cmbench.networks.base import Network, num_parameters
from cmbench.sweep.context import Context
from cmbench.sweep.imported import open_imported

diffusers = pytest.importorskip("diffusers", reason="needs the extra `diffusers`")

Command = Callable[..., Any]
DOCS = Path(__file__).parents[2] / "docs"
OPTIONS: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 16,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
THREE = {
    "block_out_channels": (32, 32, 96),
    "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
NO_ATTENTION = {
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
}


def make(**changes: Any) -> nn.Module:
    """Return diffusers' network with every weight moved off its start."""
    torch.manual_seed(0)
    model: nn.Module = diffusers.UNet2DModel(**OPTIONS | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def outputs(theirs: Any, ours: Network) -> tuple[Tensor, Tensor]:
    """Return both outputs in float64 for the same inputs, c_noise from sigma 0.002 to 80."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((3, *ours.data_shape), generator=generator, dtype=torch.float64)
    c_noise = torch.tensor([-1.55, 0.1, 1.09], dtype=torch.float64)
    labels = torch.tensor([0, 3, 2]) if ours.num_classes else None
    with torch.no_grad():
        expected = theirs.double()(x, 1000.0 * c_noise, class_labels=labels).sample
        return ours.double()(x, c_noise, labels), expected


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_class_embeds": 10},
        {"attention_head_dim": 64},
        {"attention_head_dim": None},
        {"attention_head_dim": 8},
        {"resnet_time_scale_shift": "default"},
        {"resnet_time_scale_shift": "default", "attn_norm_num_groups": None},
        THREE,
        NO_ATTENTION,
        {"time_embedding_dim": 96},
        {"in_channels": 1, "out_channels": 1},
        {"dropout": 0.2},
        {"sample_size": (16, 16)},
    ],
    ids=str,
)
def test_outputs_of_diffusers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = make(**changes)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    found = read_checkpoint(tmp_path)
    assert num_parameters(found.build()) == sum(p.numel() for p in theirs.parameters())
    # diffusers takes the time as float32, and its frequencies: 1000 radians leave 1e-5.
    assert worst(*outputs(theirs, found.build())) < 1e-5


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"downsample_type": "conv"}, "downsample_type = 'conv'"),
        ({"upsample_type": "conv"}, "upsample_type = 'conv'"),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, "down_block_types has"),
        ({"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, "up_block_types has 'UpBlock2D'"),
        ({"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D")}, "up_block_types = Attn"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups = None"),
        ({"norm_num_groups": 16}, "norm_num_groups = 16"),
        ({"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        ({"act_fn": "relu"}, "act_fn = 'relu'"),
        ({"freq_shift": 1}, "freq_shift = 1"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos = False"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ({"time_embedding_dim": 100}, "time_embedding_dim = 100"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"center_input_sample": True}, "center_input_sample = True"),
        ({"mid_block_type": None}, "mid_block_type = None"),
        ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor = 2.0"),
        ({"add_attention": False}, "add_attention = False"),
        ({"out_channels": 6}, "out_channels = 6"),
        ({"block_out_channels": (64, 96)}, "block_out_channels = [64, 96]"),
        ({"sample_size": (16, 32)}, "sample_size = [16, 32]"),
        ({"sample_size": None}, "no sample_size; allowed: the side of the images; say it with --r"),
    ],
    ids=str,
)
def test_what_has_no_counterpart_is_refused_by_name(
    cmbench: Command, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    make(**changes).save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    done = cmbench("import", str(tmp_path))
    assert done.code == 2
    assert key in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


def test_every_option_of_diffusers_is_considered(tmp_path: Path) -> None:
    """A future option is a reason to look at the importer again."""
    from cmbench.networks.diffusers_names import _BLOCKS, _REQUIRED

    make().save_pretrained(tmp_path)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text())
    read = {
        "attention_head_dim",
        "attn_norm_num_groups",
        "block_out_channels",
        "in_channels",
        "layers_per_block",
        "out_channels",
        "sample_size",
        "time_embedding_dim",
    }
    #: Of weights' shapes, of training, and of resampling that is refused.
    no_matter = {"num_class_embeds", "dropout", "num_train_timesteps", "downsample_padding"}
    known = {*_REQUIRED, *_BLOCKS, *read, *no_matter}
    assert {key for key in config if key != "_diffusers_version"} <= known


def test_weights_in_half_precision_and_in_torchs_format(tmp_path: Path) -> None:
    theirs = make().half()
    theirs.save_pretrained(tmp_path / "safe")  # type: ignore[operator]
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)  # type: ignore[operator]
    assert (tmp_path / "bin" / "diffusion_pytorch_model.bin").is_file()
    for folder in ("safe", "bin"):
        found = read_checkpoint(tmp_path / folder)
        assert {t.dtype for t in found.state.values()} == {torch.float32}
        assert worst(*outputs(theirs, found.build())) < 1e-5


def test_a_size_that_the_config_leaves_open(cmbench: Command, tmp_path: Path) -> None:
    make(sample_size=None).save_pretrained(tmp_path)  # type: ignore[operator]
    assert cmbench("import", str(tmp_path), "--resolution", "24").code == 0
    make().save_pretrained(tmp_path / "told")  # type: ignore[operator]
    done = cmbench("import", str(tmp_path / "told"), "--resolution", "24")
    assert (done.code, "--resolution 24: the file says 16; leave it out" in done.err) == (2, True)


@pytest.fixture
def pipeline(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A pipeline's folder around a class-conditional network."""
    network = make(num_class_embeds=10)
    folder = tmp_path / "made by diffusers"
    scheduler = diffusers.CMStochasticIterativeScheduler()
    diffusers.ConsistencyModelPipeline(network, scheduler).save_pretrained(folder)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    return folder, network


def test_a_pipeline_is_imported_sampled_and_taught_from(
    cmbench_with_patches: Command, pipeline: tuple[Path, nn.Module], patches: Context, recipe: str
) -> None:
    folder, theirs = pipeline
    done = cmbench_with_patches("import", str(folder), "--to", "m", "--parameterization", "edm")
    assert done.code == 0, done.err
    assert "classes          10\n" in done.out
    model = open_imported(patches.workspace, "m")
    ours = read_checkpoint(folder).build()
    ours.load_state_dict(load_file(patches.workspace.imported / "m.safetensors"))
    assert worst(*outputs(theirs, ours)) < 1e-5

    done = cmbench_with_patches(
        "run",
        "--checkpoint",
        "m",
        "-d",
        "patches",
        "--nfe",
        "3",
        "--sampler",
        "heun",
        "--no-report",
    )
    assert done.code == 0, done.err
    for method, options in (
        ("cd", ("-o", "n_points=3")),
        ("ect", ()),
        ("sct", ("-o", "parameterization=edm")),
    ):
        done = cmbench_with_patches(
            "run",
            "-m",
            method,
            "-d",
            "patches",
            "-r",
            recipe,
            "--nfe",
            "1",
            *options,
            "--no-report",
        )
        assert done.code == 0, done.err
    records = [json.loads(p.read_text()) for p in patches.workspace.root.rglob("records/**/*.json")]
    assert {r["status"] for r in records} == {"finished"}
    assert {r["method"] for r in records} == {"edm", "cd", "ect", "sct"}
    students = [r for r in records if r["kind"] == "measured"]
    assert {r["training"]["teacher"] for r in students} == {model.title}


def test_the_procedure_of_the_documentation(
    cmbench: Command,
    pipeline: tuple[Path, nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/parity.md, step by step, with its own lines for diffusers."""
    (pipeline[0]).rename(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    assert cmbench("parity", "folder", "--inputs", "inputs.safetensors").code == 0
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "parity.md").read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if "UNet2DModel" in block]
    subprocess.run([sys.executable, "-c", lines], check=True)
    done = cmbench("parity", "folder", "--reference", "outputs.safetensors")
    assert done.code == 0, done.out
    assert done.out.startswith("out.raw: largest relative error ")


def test_a_consistency_model_is_sampled_as_one(
    cmbench_with_patches: Command, pipeline: tuple[Path, nn.Module], patches: Context
) -> None:
    told = ("--parameterization", "boundary", "--sigma-min", "0.002")
    assert cmbench_with_patches("import", str(pipeline[0]), "--to", "m", *told).code == 0
    done = cmbench_with_patches(
        "run", "--checkpoint", "m", "-d", "patches", "--nfe", "1", "--no-report"
    )
    assert done.code == 0, done.err
    (path,) = patches.workspace.root.rglob("records/**/*.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["sampling"]["sampler"]) == ("finished", "multistep")
