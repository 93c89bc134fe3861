from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from metric_kit import metrics
from PIL import Image
from random_inception import write_random_torchscript

from cmbench.errors import MissingError, UserError
from cmbench.measure.loop import measure
from cmbench.metrics.clean_fid import MODES, CleanFidExtractor
from cmbench.metrics.extractor import Features
from cmbench.metrics.inception import InceptionExtractor
from cmbench.metrics.probe import probe_images, relative_error
from cmbench.metrics.reference_cache import cached_reference
from cmbench.metrics.resizers import half_pixel_bilinear, pil_bicubic
from cmbench.metrics.suite import MetricSuite
from cmbench.samples.opening import open_samples


@pytest.fixture(scope="module")
def torchscript(inception_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchscript")
    return write_random_torchscript(inception_weights, folder / "random.pt")


@pytest.mark.parametrize("size", [32, 64, 299, 350])
def test_batched_resizers_are_the_librarys(size: int) -> None:
    from cleanfid.resize import build_resizer

    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    as_numpy = image.permute(1, 2, 0).numpy()
    for mode, ours in (("clean", pil_bicubic), ("legacy_pytorch", half_pixel_bilinear)):
        theirs = torch.from_numpy(build_resizer(mode)(as_numpy)).permute(2, 0, 1)
        assert float((ours(image[None].float())[0] - theirs).abs().max()) < 1e-3, mode


@pytest.mark.parametrize("mode", list(MODES))
def test_features_are_clean_fids(
    mode: str, inception_weights: Path, torchscript: Path, tmp_path: Path
) -> None:
    """The whole of clean-fid, from PNG files to features, against both of our paths."""
    from cleanfid.fid import get_folder_features

    location = inception_weights if MODES[mode].weights == "inception" else torchscript
    fast = CleanFidExtractor(mode, location, fast_location=inception_weights, trust=True)
    assert fast.implementation == "fast"
    assert fast.deviation < 1e-5
    assert fast.short_name == f"inception-{mode}-unverified"
    images = probe_images(3, 32)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")

    def network(batch: torch.Tensor) -> torch.Tensor:
        return fast._library(batch) if mode == "legacy-tensorflow" else _resized(fast, batch)

    theirs = get_folder_features(
        str(tmp_path),
        network,
        num_workers=0,
        mode=MODES[mode].library_name,
        verbose=False,
        device=torch.device("cpu"),
    )
    assert relative_error(fast(images).pool, torch.from_numpy(theirs)) < 1e-5
    assert np.std(theirs, axis=0).mean() > 0.05


def _resized(extractor: CleanFidExtractor, batch: torch.Tensor) -> torch.Tensor:
    """clean-fid's network on images that its own dataset has resized."""
    if extractor.mode.library_name == "legacy_pytorch":
        return extractor.library(batch / 255)[0].flatten(1)
    return extractor.library(batch)


def test_modes_differ_from_each_other_and_from_the_standard(
    inception_weights: Path, torchscript: Path
) -> None:
    images = probe_images(1, 40)
    standard = InceptionExtractor(inception_weights)(images).pool
    found = {}
    for mode in MODES:
        location = inception_weights if MODES[mode].weights == "inception" else torchscript
        extractor = CleanFidExtractor(mode, location, fast_location=inception_weights, trust=True)
        found[mode] = extractor(images).pool
    assert relative_error(found["legacy-tensorflow"], standard) < 1e-5
    assert relative_error(found["clean"], standard) > 1e-3
    assert relative_error(found["legacy-pytorch"], standard) > 1e-3


def test_an_unknown_torchscript_file_is_not_run(torchscript: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a TorchScript file is a program.*prepare clean-fid"):
        CleanFidExtractor("clean", torchscript)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(torchscript.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be read.*prepare clean-fid"):
        CleanFidExtractor("clean", broken, trust=True)


def test_without_the_fast_weights_the_library_runs(
    torchscript: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    alone = CleanFidExtractor("legacy-tensorflow", torchscript, trust=True)
    assert alone.implementation == "library"
    assert alone(probe_images(1)).pool.shape == (1, 2048)
    with pytest.raises(MissingError, match="prepare inception"):
        CleanFidExtractor("legacy-tensorflow", torchscript, trust=True, implementation="fast")
    with pytest.raises(MissingError, match="prepare clean-fid"):
        CleanFidExtractor("clean")
    with pytest.raises(UserError, match="unknown mode 'cleen'"):
        CleanFidExtractor("cleen")


class Projected:
    """A few mixtures of an extractor's features: covariances of few images have full rank."""

    def __init__(self, inner: CleanFidExtractor, count: int) -> None:
        self.inner, self.feature_dim = inner, count
        self.name, self.short_name = inner.name, inner.short_name
        self.weights_sha256, self.preprocessing = inner.weights_sha256, inner.preprocessing
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(2048, count, generator=generator) / 2048**0.5

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(self.inner(images).pool @ self.matrix)

    def to(self, device: torch.device | str) -> Projected:
        return self


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_and_kid_of_folders_are_clean_fids(
    inception_weights: Path, torchscript: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both pipelines from PNG files to distances, with one network's weights."""
    from cleanfid import fid

    extractor = CleanFidExtractor("clean", torchscript, fast_location=inception_weights, trust=True)
    small = Projected(extractor, 6)
    random = np.random.RandomState(0)
    for name, contrast in (("samples", 0.7), ("real", 1.0)):
        (tmp_path / name).mkdir()
        for number in range(16):
            coarse = random.rand(4, 4, 3).repeat(8, 0).repeat(8, 1) * contrast
            pixels = (coarse + 0.1 * random.randn(32, 32, 3)).clip(0, 1) * 255
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{number:02}.png")

    def network(batch: torch.Tensor) -> torch.Tensor:
        return _resized(extractor, batch) @ small.matrix

    # clean-fid calls sqrtm(disp=False), which scipy 1.18 has no more.
    root = SimpleNamespace(sqrtm=lambda matrix, disp: (scipy.linalg.sqrtm(matrix), None))
    monkeypatch.setattr(fid, "linalg", root)
    monkeypatch.setattr(fid, "build_feature_extractor", lambda *args, **options: network)
    common = {"mode": "clean", "num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    folders = str(tmp_path / "samples"), str(tmp_path / "real")
    theirs = fid.compute_fid(*folders, **common), fid.compute_kid(*folders, **common)

    real = open_samples(folders[1])
    reference = cached_reference(
        lambda: [batch.images for batch in real.batches(5)],
        small,
        source="real",
        source_sha256="real",
        quantization="round",
        folder=None,
    )
    names = ("fd-inception-clean-unverified", "kd")
    suite = MetricSuite(metrics(*names), extractor=small, reference=reference)
    found = measure(open_samples(folders[0]), [suite], batch_size=7).metrics
    assert found[names[0]].value == pytest.approx(theirs[0], rel=1e-4)
    assert found["kd"].value == pytest.approx(theirs[1], rel=1e-3)
    assert theirs[0] > 0.01
    assert abs(theirs[1]) > 1e-3
