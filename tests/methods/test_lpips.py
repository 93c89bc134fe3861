"""LPIPS against torch-fidelity's on the same weights, its gradient, and what is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_kit import build, progress
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from cmbench.errors import MissingError, UserError
from cmbench.training.randomness import StepDraws
from cmbench_plugins import _lpips
from cmbench_plugins._lpips import HEAD_FILE, LPIPS, VGG_FILE


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the published files' format (the network's without its classifier)."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in make_layers(cfgs["D"]).state_dict().items()}
    vgg = {}
    for key, shape in shapes.items():
        fan_in = max(1, int(torch.tensor(shape[1:]).prod()))
        vgg[f"features.{key}"] = (
            torch.randn(shape) * (2 / fan_in) ** 0.5
            if len(shape) > 1
            else (torch.randn(shape) * 0.05)
        )
    torch.save(vgg, folder / VGG_FILE)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1)
        for i, c in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(heads, folder / HEAD_FILE)
    return folder


def theirs(weights: Path, monkeypatch: pytest.MonkeyPatch, pooling: str = "max") -> Any:
    """torch-fidelity's module on those weights: its own way to them would download."""
    from torch_fidelity import sample_similarity_lpips as module

    features: Any = make_layers(cfgs["D"])
    if pooling == "average":
        for index, layer in enumerate(features):
            if isinstance(layer, nn.MaxPool2d):
                features[index] = nn.AvgPool2d(2, 2)
    features.load_state_dict(
        {
            k.removeprefix("features."): v
            for k, v in torch.load(weights / VGG_FILE, weights_only=True).items()
        }
    )
    monkeypatch.setattr(
        module, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=features)
    )
    heads = torch.load(weights / HEAD_FILE, weights_only=True)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: heads)
    return module.SampleSimilarityLPIPS("lpips")


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_agrees_with_torch_fidelity(
    pooling: Any, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lpips, "LPIPS_SIDE", 48)  # that of the images: nothing is enlarged
    ours, other = LPIPS.load(str(weights), pooling), theirs(weights, monkeypatch, pooling)
    torch.manual_seed(1)
    a, b = torch.rand(2, 2, 3, 48, 48) * 2 - 1
    expected = other((a + 1) * 127.5, (b + 1) * 127.5)  # theirs takes 0 to 255
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-4, atol=1e-6)
    assert ours(a, a).tolist() == [0, 0]


def test_small_and_grey_images_with_gradient(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enlarged as in the official code; the gradient is right and finite, at zero features too."""
    monkeypatch.setattr(_lpips, "LPIPS_SIDE", 32)
    lpips = LPIPS.load(str(weights)).double()
    torch.manual_seed(1)
    a = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    b = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    distance = lpips(a, b)
    assert distance.shape == (2,)
    (gradient,) = torch.autograd.grad(distance.sum(), a)
    direction = torch.randn_like(b)
    with torch.no_grad():
        ahead, behind = (lpips(a + h * direction, b).sum() for h in (1e-6, -1e-6))
    expected = float((gradient * direction).sum())
    assert float((ahead - behind) / 2e-6) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        for stage in lpips.stages:  # every feature is zero behind these biases
            for layer in stage:
                if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                    layer.bias.fill_(-1e6)
    (gradient,) = torch.autograd.grad(lpips(a, b).sum(), a)
    assert bool((gradient == 0).all())
    assert not any(p.requires_grad for p in lpips.parameters())


@pytest.mark.parametrize("name", ["cd", "ct", "ict"])
def test_methods_train_with_it(name: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lpips, "LPIPS_SIDE", 16)
    case = build(name, metric="lpips", lpips_weights=str(weights))
    loss = case.method.loss(case.nets, case.batch(2), StepDraws(0, 0), progress())
    assert loss.shape == (2,)
    loss.sum().backward()
    assert any(bool((p.grad != 0).any()) for p in case.modules["model"].parameters())
    assert not [key for key in case.modules if "lpips" in key], "no module of the checkpoint"


def test_says_how_to_get_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingError) as caught:
        build("cd", metric="lpips").state()
    for part in ("metric lpips", VGG_FILE, "not there", "torch_fidelity", "lpips_weights"):
        assert part in str(caught.value)
    assert build("cd", metric="lpips").method.plan_sampling(1).nfe == 1  # sampling needs none


def test_refuses_what_is_not_its_weights(weights: Path, tmp_path: Path) -> None:
    (tmp_path / VGG_FILE).write_bytes(b"soduko")
    with pytest.raises(UserError, match="cannot be read"):
        LPIPS.load(str(tmp_path))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / VGG_FILE)
    with pytest.raises(UserError, match=r"features\.0\.weight of shape \(1,\).*\(64, 3, 3, 3\)"):
        LPIPS.load(str(tmp_path))
    torch.save(_Hostile(tmp_path / "run"), tmp_path / VGG_FILE)
    with pytest.raises(UserError, match="cannot be read"):
        LPIPS.load(str(tmp_path))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="data of 2 channels"):
        LPIPS.load(str(weights))(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1))


class _Hostile:
    """Would make a file if it were unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.made,)
