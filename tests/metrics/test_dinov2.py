from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cmbench.errors import MissingError, UserError
from cmbench.metrics.dinov2 import MEAN, STD, DinoExtractor, interpolated_positions, resized
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.probe import probe_images, relative_error

timm = pytest.importorskip("timm", reason="needs timm")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of ViT-S/14 with the names and shapes that Meta's file has."""
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    state = {
        name: torch.randn_like(value) * 0.05
        if value.dim() > 1
        else value + torch.randn_like(value) * 0.1
        for name, value in network.state_dict().items()
    }
    assert state["pos_embed"].shape == (1, 37 * 37 + 1, 384)
    state["mask_token"] = torch.zeros(1, 384)
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(state, path)
    return path


def by_the_equations(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The class token of DINOv2's transformer, written out (Dosovitskiy et al. 2021, eqs. 1 to 4).

    With layer scale after attention and MLP, as in DINOv2; six heads for ViT-S.
    """
    heads, width = 6, 384
    x = functional.conv2d(
        pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + interpolated_positions(state["pos_embed"])
    for number in range(12):
        get = {
            name.removeprefix(f"blocks.{number}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{number}.")
        }
        y = functional.layer_norm(x, (width,), get["norm1.weight"], get["norm1.bias"], 1e-6)
        qkv = y @ get["attn.qkv.weight"].T + get["attn.qkv.bias"]
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        y = (attention @ v).transpose(1, 2).flatten(2)
        y = y @ get["attn.proj.weight"].T + get["attn.proj.bias"]
        x = x + y * get["ls1.gamma"]
        y = functional.layer_norm(x, (width,), get["norm2.weight"], get["norm2.bias"], 1e-6)
        y = functional.gelu(y @ get["mlp.fc1.weight"].T + get["mlp.fc1.bias"])
        x = x + (y @ get["mlp.fc2.weight"].T + get["mlp.fc2.bias"]) * get["ls2.gamma"]
    x = functional.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], 1e-6)
    return x[:, 0]


def test_features_follow_the_equations(published: Path) -> None:
    extractor = DinoExtractor(published, architecture="vits14")
    assert isinstance(extractor, Extractor)
    images = probe_images(2, 32)
    pixels = resized(images) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    state = torch.load(published, weights_only=True)
    features = extractor(images)
    assert relative_error(features.pool, by_the_equations(state, (pixels - mean) / std)) < 1e-5
    assert features.logits is None
    assert (extractor.name, extractor.short_name) == ("dinov2-vits14", "dinov2-vits14")


def test_edm2s_resize_is_another_metric(published: Path) -> None:
    images = probe_images(2, 32)
    usual = DinoExtractor(published, architecture="vits14")
    edm2 = DinoExtractor(published, architecture="vits14", resize="edm2")
    assert (edm2.preprocessing, edm2.short_name) == ("edm2", "dinov2-vits14-edm2")
    pixels = functional.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True)
    assert float(pixels.max()) > 255, "it is not clipped"
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.inference_mode():
        wanted = edm2.network((pixels / 255 - mean) / std)
    assert relative_error(edm2(images).pool, wanted) < 1e-6
    assert relative_error(usual(images).pool, wanted) > 1e-4
    with pytest.raises(UserError, match="unknown resize 'nearest'"):
        DinoExtractor(published, resize="nearest")


def test_resize_is_torchvisions_on_pictures() -> None:
    """dgm-eval: ``Resize((224, 224), BICUBIC)`` on a PIL image, then ``ToTensor``."""
    from torchvision.transforms import Compose, InterpolationMode, Resize, ToPILImage, ToTensor

    steps = Compose([ToPILImage(), Resize((224, 224), InterpolationMode.BICUBIC), ToTensor()])
    for size in (32, 256):
        images = probe_images(2, size)
        theirs = torch.stack([steps(image) for image in images])
        torch.testing.assert_close(resized(images) / 255, theirs, rtol=0, atol=0)


def test_positions_follow_dinov2s_offset() -> None:
    """A linear ramp shows where the grid is read: at (i + 0.5) · 37 / 16.1 - 0.5."""
    ramp = torch.arange(37.0).repeat(37)[None, :, None]
    positions = torch.cat([torch.full((1, 1, 1), -7.0), ramp], 1)
    found = interpolated_positions(positions)[0, 1:, 0].reshape(16, 16)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    # torch's cubic (a = -0.75) misses a straight line by up to 0.05; without the offset the last
    # columns would be read 0.2 further on.
    torch.testing.assert_close(found[8, 2:-2], expected[2:-2], rtol=0, atol=0.06)
    assert abs(float(found[8, 13]) - (13.5 * 37 / 16 - 0.5)) > 0.12
    assert float(interpolated_positions(positions)[0, 0, 0]) == -7
    ready = torch.randn(1, 257, 4)
    assert interpolated_positions(ready) is ready


def test_bad_files_and_images_are_named(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot be read.*prepare dinov2"):
        DinoExtractor(path)
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds something else; allowed: DINOv2's published"):
        DinoExtractor(path)
    torch.save({"pos_embed": torch.zeros(1, 257, 384)}, path)
    with pytest.raises(UserError, match="Error"):
        DinoExtractor(path, architecture="vits14")
    with pytest.raises(UserError, match="unknown architecture 'vith14'"):
        DinoExtractor(published, architecture="vith14")
    extractor = DinoExtractor(published, architecture="vits14")
    with pytest.raises(UserError, match=r"images of torch\.float32; allowed: uint8"):
        extractor(torch.zeros(1, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingError, match="timm is not installed; pip install timm"):
        DinoExtractor(published, architecture="vits14")
