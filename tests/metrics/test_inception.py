from __future__ import annotations

import copy
import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cmbench.errors import MissingError, UserError
from cmbench.metrics import weight_files
from cmbench.metrics.inception import InceptionExtractor, load_library_network
from cmbench.metrics.inception_fast import tf1_resize_matrix
from cmbench.metrics.probe import check_probe, check_rounding, probe_images, relative_error
from cmbench.metrics.weight_files import WEIGHTS, find_weights, prepare_weights


@pytest.fixture(scope="module")
def fast(inception_weights: Path) -> InceptionExtractor:
    return InceptionExtractor(inception_weights, spatial=True)


@pytest.fixture(scope="module")
def library(inception_weights: Path) -> InceptionExtractor:
    return InceptionExtractor(inception_weights, spatial=True, implementation="library")


@pytest.mark.parametrize("size", [7, 32, 64, 299, 420])
def test_resize_is_tensorflows_to_the_rounding_of_float32(size: int) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    images = torch.randint(0, 256, (2, 3, size, size + 3)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    ours = tf1_resize_matrix(size) @ images @ tf1_resize_matrix(size + 3).T
    assert float((ours - theirs).abs().max()) < 1e-4


def test_fast_features_are_the_librarys(
    fast: InceptionExtractor, library: InceptionExtractor
) -> None:
    assert fast.deviation < 1e-5
    images = torch.cat([probe_images(2, 32), probe_images(2, 32).flip(0)])
    ours, theirs = fast(images), library(images)
    assert relative_error(ours.pool, theirs.pool) < 1e-5
    assert ours.logits is not None
    assert theirs.logits is not None
    assert relative_error(ours.logits, theirs.logits) < 1e-5
    assert ours.spatial is not None
    assert theirs.spatial is not None
    assert ours.spatial.shape == (4, 2023)
    assert relative_error(ours.spatial, theirs.spatial) < 1e-4
    assert float(ours.pool.std(0).mean()) > 0.05, "the features must tell the images apart"


def test_fast_is_as_near_to_float64_as_the_library(
    fast: InceptionExtractor, library: InceptionExtractor
) -> None:
    """TF32 would show as 1e-2 here, autocast as 1e-1."""
    images = probe_images(2, 32)
    exact = load_library_network_in_float64(library)(images)[0]
    assert relative_error(fast(images).pool, exact) < 1e-5
    assert relative_error(library(images).pool, exact) < 1e-5


def load_library_network_in_float64(extractor: InceptionExtractor) -> torch.nn.Module:
    import copy

    network = copy.deepcopy(extractor.library).double()
    network.feature_extractor_internal_dtype = torch.float64
    return network


def test_autocast_around_it_is_kept_out(fast: InceptionExtractor) -> None:
    images = probe_images(1)
    plain = fast(images).pool
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fast(images).pool
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


def test_tf32_flags_are_off_inside_and_back_outside(
    fast: InceptionExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run, matmul, cudnn = fast._run, torch.backends.cuda.matmul, torch.backends.cudnn

    def watch(*arguments: Any, **options: Any) -> Any:
        seen.append((matmul.allow_tf32, cudnn.allow_tf32))
        return run(*arguments, **options)

    monkeypatch.setattr(fast, "_run", watch)
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        fast(probe_images(1))
        assert seen == [(False, False)]
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_features_of_reduced_precision_are_refused(
    fast: InceptionExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TF32 does to one side of every product: ten bits of mantissa are left."""
    error = fast.rounding(1)
    assert error < 2e-5
    check_rounding("inception extractor", error)
    coarse = copy.deepcopy(fast.fast)
    assert coarse is not None
    for parameter in coarse.parameters():
        parameter.data = (parameter.data.view(torch.int32) & ~0x1FFF).view(torch.float32)
    monkeypatch.setattr(fast, "_run", coarse)
    with pytest.raises(UserError, match=r"differ from float64's by .*switch off TF32"):
        check_rounding("inception extractor", fast.rounding(1))


def test_features_do_not_depend_on_the_batch(fast: InceptionExtractor) -> None:
    images = probe_images(3)
    alone = torch.cat([fast(image[None]).pool for image in images])
    assert relative_error(alone, fast(images).pool) < 1e-5


@pytest.mark.parametrize("layer", ["64", "192", "768"])
def test_earlier_layers(inception_weights: Path, layer: str) -> None:
    ours = InceptionExtractor(inception_weights, layer=layer)
    assert ours.deviation < 1e-5
    features = ours(probe_images(1))
    assert features.pool.shape == (1, int(layer))
    assert features.logits is None
    assert ours.name == f"inception-{layer}"


def test_random_weights_are_never_called_fid(fast: InceptionExtractor) -> None:
    assert fast.short_name == "inception-unverified"
    assert fast.weights_sha256[:8] != "6726825d"


def test_published_weights_are_recognised_by_their_hash(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    known = replace(WEIGHTS["inception"], sha256=digest[:8])
    monkeypatch.setitem(weight_files.WEIGHTS, "inception", known)
    extractor = InceptionExtractor(inception_weights, layer="64", implementation="library")
    assert extractor.short_name == "inception-64"


def test_floats_are_taken_by_the_fast_path_only(
    fast: InceptionExtractor, library: InceptionExtractor
) -> None:
    images = probe_images(2)
    floats = images.float() / 127.5 - 1
    assert relative_error(fast(floats).pool, fast(images).pool) < 1e-5
    with pytest.raises(UserError, match=r"float images in the library's path; allowed: uint8"):
        library(floats)


def test_bad_images_and_options_are_named(
    inception_weights: Path, fast: InceptionExtractor
) -> None:
    with pytest.raises(UserError, match=r"\(2, 1, 8, 8\); allowed: RGB.*convert grey"):
        fast(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="layer '512'; allowed: 64, 192, 768, 2048"):
        InceptionExtractor(inception_weights, layer="512")
    with pytest.raises(UserError, match="bfloat16 in the library's path"):
        InceptionExtractor(inception_weights, implementation="library", precision="bfloat16")


def test_a_probe_that_disagrees_is_an_error(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"differ from the library's by 0\.002.*library"):
        check_probe("inception extractor", 2e-3, remedy="use implementation='library'")
    with pytest.raises(UserError, match="differ"):
        check_probe("x", float("nan"), remedy="")
    matrix = tf1_resize_matrix

    def shifted(size: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return matrix(size, dtype=dtype).roll(1, 0)

    monkeypatch.setattr("cmbench.metrics.inception_fast.tf1_resize_matrix", shifted)
    with pytest.raises(UserError, match="probe features differ"):
        InceptionExtractor(inception_weights, layer="64")


def test_bfloat16_is_another_metric(inception_weights: Path) -> None:
    extractor = InceptionExtractor(inception_weights, layer="64", precision="bfloat16")
    assert extractor.preprocessing == "tf1-bilinear+bfloat16"
    assert 1e-5 < extractor.deviation < 0.1
    assert extractor(probe_images(1)).pool.dtype == torch.float32


class TestFiles:
    def test_other_files_are_refused_without_running_them(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"

        class Payload:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (print, ("executed",))

        torch.save({"fc.weight": Payload()}, path)
        with pytest.raises(UserError, match=r"cannot be read.*cmbench prepare inception"):
            load_library_network(path, ("2048",))
        path.write_bytes(pickle.dumps([1, 2]))
        with pytest.raises(UserError, match="cmbench prepare inception"):
            load_library_network(path, ("2048",))
        torch.save({"other": torch.zeros(2)}, path)
        with pytest.raises(UserError, match="holds something else; allowed: torch-fidelity's"):
            load_library_network(path, ("2048",))
        torch.save({"fc.weight": torch.zeros(2)}, path)
        with pytest.raises(UserError, match=r"weights .*weights\.pth"):
            load_library_network(path, ("2048",))

    def test_the_library_unpickles_what_was_checked_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file may be two archives, and torch's reader may find the other one."""
        path, given = tmp_path / "weights.pth", []

        def library(*_: object, feature_extractor_weights_path: str) -> torch.nn.Module:
            used = feature_extractor_weights_path
            given.append((used, torch.load(used, weights_only=True)))
            return torch.nn.Identity()

        name = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
        monkeypatch.setattr(name, library)
        torch.save({"fc.weight": torch.arange(3)}, path)
        load_library_network(path, ("2048",))
        ((used, state),) = given
        assert used != str(path)
        assert torch.equal(state["fc.weight"], torch.arange(3))

    def test_missing_weights_say_how_to_get_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        for name in WEIGHTS:
            with pytest.raises(MissingError, match=rf"run `cmbench prepare {name}`.*--from FILE"):
                find_weights(name)
        with pytest.raises(MissingError, match="no file /nowhere"):
            find_weights("inception", "/nowhere")
        with pytest.raises(UserError, match=r"unknown weight 'incepton'.*'inception'"):
            find_weights("incepton")

    def test_prepare_verifies_what_it_installs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        content = b"the published weights"
        digest = hashlib.sha256(content).hexdigest()
        known = replace(WEIGHTS["inception"], sha256=digest[:8])
        monkeypatch.setitem(weight_files.WEIGHTS, "inception", known)
        monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path / "w"))
        source = tmp_path / "carried-over.bin"
        source.write_bytes(b"something else")
        with pytest.raises(UserError, match="nothing was installed"):
            prepare_weights("inception", source)
        assert list((tmp_path / "w").iterdir()) == []
        source.write_bytes(content)
        path = prepare_weights("inception", source)
        assert path.read_bytes() == content
        assert find_weights("inception") == path
        assert prepare_weights("inception") == path, "no download of what is there"
        fetched: list[str] = []

        def download(url: str, target: Path) -> None:
            fetched.append(url)
            target.write_bytes(source.read_bytes())

        monkeypatch.setattr(weight_files, "download", download)
        path.write_bytes(b"damaged")
        assert prepare_weights("inception").read_bytes() == content, "a damaged file is replaced"
        assert fetched == [known.url]
        source.write_bytes(b"not what was published")
        path.write_bytes(b"damaged")
        with pytest.raises(UserError, match=f"allowed: {digest[:8]}"):
            prepare_weights("inception")
        with pytest.raises(MissingError, match="check --from"):
            prepare_weights("inception", tmp_path / "absent")

    def test_a_failed_download_names_the_address(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dead = replace(WEIGHTS["clean-fid"], url=(tmp_path / "no-such-file").as_uri())
        monkeypatch.setitem(weight_files.WEIGHTS, "clean-fid", dead)
        with pytest.raises(MissingError, match=r"cannot download file://.*not https.*--from FILE"):
            prepare_weights("clean-fid", folder=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_libraries_own_caches_are_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path / "none"))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        cache = tmp_path / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        cached = cache / "pt_inception-2015-12-05-6726825d.pth"
        cached.write_bytes(b"x")
        assert find_weights("inception") == cached
