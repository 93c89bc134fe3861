from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_kit import metrics
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.extractor import Features
from cmbench.metrics.reference_cache import cached_reference
from cmbench.metrics.reference_import import (
    PUBLISHED,
    export_reference,
    import_reference,
    with_reference_images,
)
from cmbench.metrics.reference_store import ReferenceStore, compare_references
from cmbench.metrics.shipped_cnn import DigitsExtractor
from cmbench.metrics.suite import MetricSuite, check_reference
from cmbench.samples.opening import open_samples

pytestmark = pytest.mark.usefixtures("any_width")

DIM = 6
ROWS = np.random.RandomState(0).randn(40, DIM)
MU, SIGMA = ROWS.mean(0), np.cov(ROWS, rowvar=False)


class StandIn:
    """An extractor that claims to be a published one."""

    def __init__(self, name: str) -> None:
        weights, self.preprocessing = PUBLISHED[name]
        self.name, self.short_name = name, f"{name}-stand-in"
        self.weights_sha256 = weights.ljust(64, "0")
        self.feature_dim = DIM

    def __call__(self, images: Tensor) -> Features:
        return Features(images.flatten(1)[:, :DIM].float())

    def to(self, device: Any) -> StandIn:
        return self


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


class TestFormats:
    def test_edm(self, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "cifar10-32x32.npz", mu=MU, sigma=SIGMA)
        reference = import_reference(path)
        np.testing.assert_array_equal(reference.moments.mean, MU)
        np.testing.assert_allclose(reference.moments.cov, SIGMA, rtol=1e-15)
        assert reference.key.extractor == "inception-legacy-tensorflow"
        assert reference.key.origin == "edm"
        assert reference.count is None
        assert reference.moments.divisor == "unknown"
        assert import_reference(path, count=40).count == 40

    @pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow", "legacy_pytorch"])
    def test_clean_fid(self, tmp_path: Path, mode: str) -> None:
        path = write_npz(tmp_path / f"cifar10_{mode}_train_32.npz", mu=MU, sigma=SIGMA)
        reference = import_reference(path)
        assert reference.key.extractor == f"inception-{mode.replace('_', '-')}"
        assert reference.key.origin == "clean-fid"

    @pytest.mark.parametrize("name", ["imagenet-64x64-clean", "clean_run", "my_clean_data"])
    def test_the_word_clean_alone_is_no_mode(self, tmp_path: Path, name: str) -> None:
        path = write_npz(tmp_path / f"{name}.npz", mu=MU, sigma=SIGMA)
        assert import_reference(path).key.extractor == "inception-legacy-tensorflow"
        chosen = import_reference(path, extractor="inception-clean")
        assert chosen.key.extractor == "inception-clean"

    def test_clean_fid_features(self, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "x_clean_custom_na_kid.npz", feats=ROWS.astype(np.float32))
        reference = import_reference(path)
        assert reference.features is not None
        assert reference.features.shape == (40, DIM)
        assert reference.count == 40
        np.testing.assert_allclose(reference.moments.cov, SIGMA, rtol=1e-5)

    def test_openai(self, tmp_path: Path) -> None:
        images = np.zeros((5, 8, 8, 3), np.uint8)
        spatial = np.random.RandomState(1).randn(30, 4)
        path = write_npz(
            tmp_path / "VIRTUAL_imagenet64_labeled.npz",
            mu=MU,
            sigma=SIGMA,
            mu_s=spatial.mean(0),
            sigma_s=np.cov(spatial, rowvar=False),
            arr_0=images,
        )
        reference = import_reference(path)
        assert reference.key.extractor == "inception"
        assert reference.key.origin == "openai"
        assert reference.spatial is not None
        np.testing.assert_allclose(reference.spatial.mean, spatial.mean(0))

    def test_openai_images_give_features_but_leave_the_moments(self, tmp_path: Path) -> None:
        path = write_npz(
            tmp_path / "v.npz", mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA, arr_0=np.zeros(1)
        )
        images = torch.randint(0, 256, (12, 3, 4, 4), dtype=torch.uint8)
        bare = import_reference(path)
        whole = with_reference_images(bare, images.split(5), StandIn("inception"))
        assert whole.features is not None
        assert len(whole.features) == 12
        assert whole.moments is bare.moments
        assert whole.floors is not None, "pages of scored samples show the floor"
        with pytest.raises(
            UserError, match=r"is 'inception-clean' with weights .*allowed: 'inception' w"
        ):
            with_reference_images(bare, [images], StandIn("inception-clean"))

    def test_torch_fidelity(self, tmp_path: Path) -> None:
        torch.save({"mu": MU, "sigma": SIGMA}, tmp_path / "stat.pt")
        reference = import_reference(tmp_path / "stat.pt", name="cifar10-train")
        assert reference.key.origin == "torch-fidelity"
        assert reference.key.source == "cifar10-train"
        np.testing.assert_array_equal(reference.moments.mean, MU)
        torch.save(torch.from_numpy(ROWS).float(), tmp_path / "features.pt")
        assert import_reference(tmp_path / "features.pt").count == 40

    def test_edm2(self, tmp_path: Path) -> None:
        entries = {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU + 1, "sigma": SIGMA}}
        (tmp_path / "img64.pkl").write_bytes(pickle.dumps(entries))
        assert import_reference(tmp_path / "img64.pkl").key.extractor.endswith("legacy-tensorflow")
        dino = import_reference(tmp_path / "img64.pkl", entry="fd_dinov2")
        assert dino.key.extractor == "dinov2"
        np.testing.assert_array_equal(dino.moments.mean, MU + 1)
        with pytest.raises(UserError, match=r"no entry 'kid'.*the file has: fd_dinov2, fid"):
            import_reference(tmp_path / "img64.pkl", entry="kid")

    def test_edm2s_dinov2_statistics_fit_edm2s_resize_only(self, tmp_path: Path) -> None:
        path = tmp_path / "img512.pkl"
        path.write_bytes(pickle.dumps({"fd_dinov2": {"mu": MU, "sigma": SIGMA}}))
        reference = import_reference(path, entry="fd_dinov2")
        extractor = StandIn("dinov2")
        extractor.preprocessing = "edm2"
        check_reference(extractor, reference, "round")
        extractor.preprocessing = "pil-bicubic-8bit"
        with pytest.raises(UserError, match="made with preprocessing 'edm2'"):
            check_reference(extractor, reference, "round")

    def test_our_own_export_comes_back(self, tmp_path: Path) -> None:
        first = import_reference(write_npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA))
        export_reference(first, tmp_path / "b.npz")
        again = import_reference(tmp_path / "b.npz")
        assert torch.equal(again.moments.cov, first.moments.cov)


class TestBadFiles:
    def test_each_is_named(self, tmp_path: Path) -> None:
        cases: list[tuple[Path, str]] = [
            (tmp_path / "absent.npz", "does not exist"),
            (write_npz(tmp_path / "other.npz", x=MU), r"holds x; allowed: an EDM"),
            (write_npz(tmp_path / "shape.npz", mu=MU, sigma=SIGMA[:3]), r"allowed: \[D\] and"),
            (write_npz(tmp_path / "int.npz", mu=MU.astype(int), sigma=SIGMA), "floating point"),
            (write_npz(tmp_path / "skew.npz", mu=MU, sigma=SIGMA + np.eye(DIM, k=1)), "symmetric"),
            (
                write_npz(tmp_path / "nan.npz", mu=MU * np.nan, sigma=SIGMA),
                "mu or sigma hold NaN or infinite values; fetch the file again",
            ),
            (write_npz(tmp_path / "f_clean.npz", feats=MU), r"allowed: floats \[N, D\]"),
        ]
        (tmp_path / "cut.npz").write_bytes((tmp_path / "int.npz").read_bytes()[:200])
        (tmp_path / "no.bin").write_bytes(b"x")
        (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
        (tmp_path / "cut.pt").write_bytes(b"x")
        cases += [
            (tmp_path / "cut.npz", "cannot be read"),
            (tmp_path / "no.bin", "a .bin file"),
            (tmp_path / "list.pkl", "holds list"),
            (tmp_path / "cut.pt", "truncated or corrupt"),
        ]
        for path, words in cases:
            with pytest.raises(UserError, match=words) as caught:
                import_reference(path)
            assert path.name in str(caught.value)
        good = write_npz(tmp_path / "good.npz", mu=MU, sigma=SIGMA)
        with pytest.raises(UserError, match="unknown extractor 'vgg'"):
            import_reference(good, extractor="vgg")
        with pytest.raises(UserError, match="count 1; allowed: at least 2"):
            import_reference(good, count=1)

    def test_damaged_and_lying_archives(self, tmp_path: Path) -> None:
        head = b"\x93NUMPY\x01\x00v\x00" + (
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000,), }".ljust(117)
            + b"\n"
        )
        for name, size in (("claims.npz", None), ("both.npz", 8 * 10**14)):
            with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("mu.npy", head + bytes(80))
                if size is not None:
                    archive.getinfo("mu.npy").file_size = size
        np.savez_compressed(tmp_path / "bits.npz", mu=MU, sigma=SIGMA)
        content = bytearray((tmp_path / "bits.npz").read_bytes())
        content[80:120] = bytes(40)
        (tmp_path / "bits.npz").write_bytes(content)
        (tmp_path / "other.npz").write_bytes(head)
        for name in ("claims.npz", "both.npz", "bits.npz", "other.npz"):
            for read in (import_reference, lambda path: open_samples(str(path))):
                with pytest.raises(UserError) as caught:
                    read(tmp_path / name)
                assert name in str(caught.value)

    def test_only_the_arrays_of_statistics_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA, arr_0=np.zeros((9, 8, 8, 3)))
        read, seen = np.lib.format.read_array, []

        def watched(file: Any, **options: Any) -> Any:
            seen.append(file.name)
            return read(file, **options)

        monkeypatch.setattr(np.lib.format, "read_array", watched)
        import_reference(path)
        assert sorted(seen) == ["mu.npy", "sigma.npy"]

    def test_nothing_is_executed(self, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return (Path(tmp_path / "executed").write_text, ("x",))

        np.savez(tmp_path / "p.npz", mu=np.array([Payload()], dtype=object), sigma=SIGMA)
        torch.save({"mu": Payload(), "sigma": 1}, tmp_path / "p.pt")
        (tmp_path / "p.pkl").write_bytes(pickle.dumps({"fid": Payload()}))
        for suffix in ("npz", "pt", "pkl"):
            with pytest.raises(UserError):
                import_reference(tmp_path / f"p.{suffix}")
        assert not (tmp_path / "executed").exists()


class TestUse:
    def test_an_imported_reference_serves_its_extractor_only(self, tmp_path: Path) -> None:
        reference = import_reference(write_npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA))
        check_reference(StandIn("inception-legacy-tensorflow"), reference, "truncate")
        with pytest.raises(UserError, match="made with extractor 'inception-legacy-tensorflow'"):
            check_reference(StandIn("inception"), reference, "round")
        unverified = StandIn("inception-legacy-tensorflow")
        unverified.weights_sha256 = "f" * 64
        with pytest.raises(UserError, match="made with weights"):
            check_reference(unverified, reference, "round")

    def test_it_scores_samples_and_says_what_it_lacks(self, tmp_path: Path) -> None:
        name = "inception-legacy-tensorflow"
        reference = import_reference(write_npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA))
        metric = f"fd-{name}-stand-in"
        suite = MetricSuite(
            metrics(metric, extractor=StandIn(name)), extractor=StandIn(name), reference=reference
        )
        suite.update(torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8))
        value = suite.finalize()[metric]
        assert value.detail["reference_samples"] is None
        assert value.detail["reference_covariance_divisor"] == "unknown"
        assert ":n-1/unknown:" in value.key
        with pytest.raises(UserError, match="holds a mean and a covariance only"):
            MetricSuite(metrics("recall"), extractor=StandIn(name), reference=reference)

    def test_keys_of_files_and_of_computed_references_differ(self, tmp_path: Path) -> None:
        first = import_reference(write_npz(tmp_path / "a.npz", mu=MU, sigma=SIGMA))
        second = import_reference(write_npz(tmp_path / "b.npz", mu=MU + 1, sigma=SIGMA))
        assert first.key.digest != second.key.digest


class TestStore:
    def test_list_get_and_compare(self, tmp_path: Path) -> None:
        store = ReferenceStore(tmp_path / "store")
        assert list(store.entries()) == []
        with pytest.raises(UserError, match="'x': does not exist; allowed: none yet; see `cmbench"):
            store.get("x")
        first = import_reference(write_npz(tmp_path / "one.npz", mu=MU, sigma=SIGMA))
        second = import_reference(write_npz(tmp_path / "only.npz", mu=MU + 1, sigma=SIGMA))
        paths = [store.add(first), store.add(second)]
        (tmp_path / "store" / "broken.safetensors").write_bytes(b"x")
        entries = {entry.name: entry for entry in store.entries()}
        assert len(entries) == 3
        assert entries["broken"].reference is None
        assert "cannot be read" in entries["broken"].problem
        assert store.get("one").key == first.key
        assert store.get(paths[1].stem).key == second.key
        assert store.get(str(paths[1])).key == second.key
        with pytest.raises(UserError, match=r"'on': is ambiguous; allowed: one-.*, only-"):
            store.get("on")
        comparison = compare_references(first, second)
        assert comparison.frechet == pytest.approx(DIM)
        assert comparison.mean_part == pytest.approx(1)
        assert comparison.relative == pytest.approx(DIM / np.trace(SIGMA))

    def test_different_extractors_do_not_compare(self, tmp_path: Path) -> None:
        digits = cached_reference(
            lambda: [torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)],
            DigitsExtractor(),
            source="d",
            source_sha256="0",
            quantization="round",
            folder=None,
        )
        other = import_reference(write_npz(tmp_path / "one.npz", mu=MU, sigma=SIGMA))
        with pytest.raises(UserError, match="extractor 'digits-cnn' against 'inception-legacy"):
            compare_references(digits, other)
