from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmbench.cli.eval_work import keep_first
from cmbench.data.base import Dataset
from cmbench.data.digits import read_digits
from cmbench.errors import MissingError
from cmbench.leaderboard.details import floor_of
from cmbench.leaderboard.rows import aggregate
from cmbench.metrics.reference_import import PUBLISHED
from cmbench.metrics.weight_files import WEIGHTS, find_weights, weights_folder
from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.scored import score
from cmbench.sweep.scored_record import ScoreRequest

pytestmark = pytest.mark.usefixtures("any_width")

Cmbench = Callable[..., Any]
DIM = 4


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """Real digits with noise, as an OpenAI sample batch with labels."""
    pixels, labels = read_digits()
    noise = np.random.RandomState(0).randn(*pixels.shape) * 20
    images = np.clip(pixels + noise, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "noisy.npz", images[:400], labels[:400])
    return tmp_path / "noisy.npz"


def write_statistics(path: Path, shift: float = 0.0) -> Path:
    rows = np.random.RandomState(0).randn(50, DIM) + shift
    np.savez(path, mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    return path


class TestEval:
    def test_table_record_and_second_run(
        self, cmbench: Cmbench, noisy: Path, workspace: Workspace
    ) -> None:
        options = ("--dataset", "digits", "--label", "my model", "--nfe", "2", "-q")
        first = cmbench("eval", str(noisy), *options)
        assert first.code == 0, first.err
        assert "my model: 400 samples on digits" in first.out
        assert "fd-digits" in first.out
        assert "400 samples instead of the protocol's 2000" in first.err
        (path,) = workspace.records("digits").glob("*.json")
        assert f"record: {path}" in first.out
        record = read_record(path)
        assert record.kind == "scored samples"
        assert record.label == "my model"
        assert record.method.startswith("my-model-")
        assert record.sampling.nfe == 2
        assert record.rank_metric == "fd-digits"
        assert record.metrics["fd-digits"].detail["samples"] == 400
        floor = floor_of(record.metrics["fd-digits"])
        assert floor is not None
        assert (floor.samples, floor.reference_samples) == (400, 1797)
        assert f"{floor.number}" in first.out
        assert record.dataset.reference_count == 1797
        before = path.read_bytes()
        again = cmbench("eval", str(noisy), *options)
        assert again.code == 0, again.err
        assert path.read_bytes() == before
        assert len(list(workspace.records("digits").glob("*.json"))) == 1

    def test_json_goes_to_stdout_alone(self, cmbench: Cmbench, noisy: Path) -> None:
        found = cmbench("eval", str(noisy), "-d", "digits", "--metrics", "pr", "--json", "-q")
        assert set(json.loads(found.out)["metrics"]) == {"precision", "recall"}
        assert "network evaluations per sample are not known" in found.err

    def test_what_is_not_stated_is_not_shown_as_zero(
        self, cmbench: Cmbench, noisy: Path, workspace: Workspace
    ) -> None:
        assert cmbench("eval", str(noisy), "-d", "digits", "--metrics", "fd-digits", "-q").code == 0
        (path,) = workspace.records("digits").glob("*.json")
        (row,) = aggregate([(path, read_record(path))])
        assert (row.nfe, row.nfe_text, row.parameters) == (None, "not stated", None)
        assert cmbench("report", "--dataset", "digits").code == 0
        text = "".join(p.read_text() for p in workspace.reports.glob("*.md"))
        assert "not stated" in text
        csv = cmbench("export", "csv").out
        assert ",0," not in csv.splitlines()[1]
        shown = cmbench("show", path.stem).out
        assert "training     not stated\n" in shown
        assert "sampling     NFE not stated (not counted), npz, 400 images, seed 0\n" in shown

    def test_another_source_as_reference(
        self, cmbench: Cmbench, noisy: Path, workspace: Workspace
    ) -> None:
        found = cmbench(
            "eval",
            str(noisy),
            "--reference",
            str(noisy),
            "--extractor",
            "digits-cnn",
            "--metrics",
            "fd-digits",
            "--no-record",
            "--json",
            "-q",
        )
        assert found.code == 0, found.err
        value = json.loads(found.out)["metrics"]["fd-digits"]["value"]
        assert abs(value) < 1e-9
        assert "400 of 400 samples equal a reference image" in found.err
        assert not workspace.all_records.exists()

    def test_inception_with_weights_from_a_file(
        self, cmbench: Cmbench, tmp_path: Path, inception_weights: Path
    ) -> None:
        for name, seed in (("a", 0), ("b", 1)):
            random = np.random.RandomState(seed)
            np.save(tmp_path / f"{name}.npy", random.randint(0, 256, (5, 9, 9, 3)).astype(np.uint8))
        common = (
            "eval",
            str(tmp_path / "a.npy"),
            "--reference",
            str(tmp_path / "b.npy"),
            "--weights",
            str(inception_weights),
            "--no-record",
            "-q",
        )
        refused = cmbench(*common, "--metrics", "fid")
        assert refused.code == 2
        assert "ask for 'fd-inception-unverified' instead" in refused.err
        found = cmbench(*common, "--metrics", "fd-inception-unverified,is", "--json")
        assert found.code == 0, found.err
        record = json.loads(found.out)
        detail = record["metrics"]["fd-inception-unverified"]["detail"]
        assert detail["extractor_implementation"] == "fast"
        assert detail["extractor_deviation"] < 1e-5
        assert "rank-deficient" in "\n".join(record["warnings"])

    def test_mistakes_are_one_line(
        self, cmbench: Cmbench, noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path / "none"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
        cases: list[tuple[tuple[str, ...], int, str]] = [
            ((str(noisy),), 2, "nothing to compare with"),
            (("absent", "-d", "digits"), 4, "does not exist"),
            ((str(noisy), "-d", "digits", "--metrics", "fid"), 4, "cmbench prepare inception"),
            ((str(noisy), "-d", "digits", "--metrics", "fod"), 2, "unknown metric 'fod'"),
            ((str(noisy), "-d", "nodata"), 2, "unknown dataset 'nodata'"),
            (
                (
                    str(noisy),
                    "--reference",
                    "nowhere",
                    "--metrics",
                    "kd",
                    "--extractor",
                    "digits-cnn",
                ),
                2,
                "reference 'nowhere': does not exist",
            ),
            (
                (str(noisy), "-d", "digits", "--metrics", "fid,fd-digits", "--weights", str(noisy)),
                2,
                "metrics of one extractor",
            ),
            ((str(noisy), "-d", "digits", "--quantize", "maybe"), 2, "'maybe'"),
        ]
        for arguments, code, words in cases:
            found = cmbench("eval", *arguments, "-q")
            assert found.code == code, found.err
            assert words in found.err
            assert "Traceback" not in found.err
            assert found.out == ""

    def test_labels_and_real_images_are_checked_too(
        self, cmbench: Cmbench, noisy: Path, tmp_path: Path
    ) -> None:
        pixels = read_digits()[0]
        lossy = tmp_path / "lossy"
        lossy.mkdir()
        for number, image in enumerate(pixels[:60, 0].astype(np.uint8)):
            Image.fromarray(image).save(lossy / f"{number:03}.jpg")
        skewed = tmp_path / "skewed.npz"
        with np.load(noisy) as arrays:
            np.savez(skewed, arrays["arr_0"], np.zeros(400, np.int64))
        found = cmbench(
            "eval",
            str(skewed),
            "-d",
            "digits",
            "--reference",
            str(lossy),
            "--metrics",
            "fd-digits",
            "--no-record",
            "-q",
        )
        assert found.code == 0, found.err
        assert "reference: 60 of 60 samples are JPEG or another lossy format" in found.err
        assert "9 of 10 classes have no sample" in found.err

    def test_memorised_images_when_asked(self, cmbench: Cmbench, tmp_path: Path) -> None:
        pixels = read_digits()[0].astype(np.uint8)
        for name, part in (
            ("train", pixels[:600]),
            ("unseen", pixels[600:1200]),
            ("fresh", pixels[1200:1700]),
        ):
            np.save(tmp_path / f"{name}.npy", part)
        noise = np.random.RandomState(0).randint(-3, 4, (500, 1, 8, 8))
        copies = (pixels[:500].astype(int) + noise).clip(0, 255).astype(np.uint8)
        np.save(tmp_path / "copies.npy", copies)

        def share(samples: str) -> tuple[float, str]:
            found = cmbench(
                "eval",
                str(tmp_path / samples),
                "--reference",
                str(tmp_path / "train.npy"),
                "--held-out",
                str(tmp_path / "unseen.npy"),
                "--extractor",
                "digits-cnn",
                "--metrics",
                "fd-digits",
                "--no-record",
                "--json",
                "-q",
            )
            assert found.code == 0, found.err
            detail = json.loads(found.out)["metrics"]["fd-digits"]["detail"]
            return detail["memorisation"]["train_share"], found.err

        fair, said = share("fresh.npy")
        assert 0.4 < fair < 0.6
        assert "memorised" not in said
        copied, said = share("copies.npy")
        assert copied > 0.95
        assert "are nearer to a reference image than to a held-out one" in said
        same, said = share("unseen.npy")
        assert same < 0.05
        assert "did the generator see the held-out images, or are they its samples?" in said

    def test_a_second_look_at_the_same_row_is_said(
        self, cmbench: Cmbench, noisy: Path, tmp_path: Path
    ) -> None:
        common = ("-d", "digits", "--metrics", "fd-digits", "--label", "mine", "-q")
        assert "other set(s) of samples" not in cmbench("eval", str(noisy), *common).err
        fewer = cmbench("eval", str(noisy), "--limit", "300", *common)
        assert "1 other set(s) of samples named 'mine' were scored here" in fewer.err
        other_seed = cmbench("eval", str(noisy), "--limit", "200", "--seed", "1", *common)
        assert "other set(s) of samples" not in other_seed.err

    def test_with_a_reference_the_dataset_need_not_be_here(
        self, cmbench: Cmbench, noisy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The protocol of a dataset without its images, against other images or statistics."""

        def absent(self: Context, name: str) -> Dataset:
            raise MissingError(f"dataset {name!r}", "is not here", remedy="run `cmbench prepare`")

        monkeypatch.setattr(Context, "dataset", absent)
        alone = cmbench("eval", str(noisy), "-d", "digits", "-q")
        assert alone.code == 4
        assert "run `cmbench prepare`" in alone.err
        found = cmbench(
            "eval",
            str(noisy),
            "-d",
            "digits",
            "--reference",
            str(noisy),
            "--metrics",
            "fd-digits",
            "--no-record",
            "--json",
            "-q",
        )
        assert found.code == 0, found.err
        record = json.loads(found.out)
        assert record["dataset"]["name"] == "digits"
        assert record["sampling"]["protocol_samples"] == 2000

    def test_openais_batches(
        self,
        cmbench: Cmbench,
        tmp_path: Path,
        inception_weights: Path,
        workspace: Workspace,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Precision and recall are against the file's images, extracted once."""
        sha256 = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
        weights = replace(WEIGHTS["inception"], sha256=sha256)
        monkeypatch.setitem(WEIGHTS, "inception", weights)
        monkeypatch.setitem(PUBLISHED, "inception", (sha256[:8], "tf1-bilinear"))
        random = np.random.RandomState(0)
        samples, real = random.randint(0, 256, (2, 5, 9, 9, 3)).astype(np.uint8)
        np.savez(tmp_path / "samples.npz", samples)
        moments = {"mu": np.zeros(DIM), "sigma": np.eye(DIM)}  # no distance is asked for
        spatial = {"mu_s": np.zeros(DIM), "sigma_s": np.eye(DIM)}
        np.savez(tmp_path / "VIRTUAL.npz", real, **moments, **spatial)
        command = [
            "eval",
            str(tmp_path / "samples.npz"),
            "--reference",
            str(tmp_path / "VIRTUAL.npz"),
            "--metrics",
            "pr",
            "--weights",
            str(inception_weights),
            "--no-record",
            "--json",
            "-q",
        ]
        found = cmbench(*command)
        assert found.code == 0, found.err
        metrics = json.loads(found.out)["metrics"]
        assert metrics["precision"]["detail"]["reference_features"] == 5
        (kept,) = (workspace.cache / "references").glob("*.safetensors")
        assert "with-images" in kept.name
        again = json.loads(cmbench(*command).out)["metrics"]
        assert again["recall"] == metrics["recall"]
        write_statistics(tmp_path / "alone.npz")  # without images
        command[command.index(str(tmp_path / "VIRTUAL.npz"))] = str(tmp_path / "alone.npz")
        alone = cmbench(*command)
        assert alone.code == 2
        assert "holds a mean and a covariance only" in alone.err


class TestRefs:
    def test_import_list_show_compare_export(
        self, cmbench: Cmbench, tmp_path: Path, workspace: Workspace
    ) -> None:
        first = write_statistics(tmp_path / "one.npz")
        second = write_statistics(tmp_path / "two.npz", shift=1.0)
        for path in (first, second):
            done = cmbench("refs", "import", str(path), "--count", "50")
            assert done.code == 0, done.err
            assert str(workspace.root / "references") in done.out
        listed = cmbench("refs", "list")
        assert "one-inception-legacy-tensorflow" in listed.out
        assert "edm" in listed.out
        found = json.loads(cmbench("refs", "list", "--json").out)
        assert [entry["count"] for entry in found] == [50, 50]
        shown = json.loads(cmbench("refs", "show", "one", "--json").out)
        assert shown["origin"] == "edm"
        assert shown["dimensions"] == DIM
        assert "dimensions       4" in cmbench("refs", "show", "one").out
        compared = json.loads(cmbench("refs", "compare", "one", "two", "--json").out)
        assert compared["frechet"] == pytest.approx(DIM)
        assert "Fréchet distance 4 " in cmbench("refs", "compare", "one", "two").out
        assert cmbench("refs", "export", "one", str(tmp_path / "out.npz")).code == 0
        with np.load(tmp_path / "out.npz") as exported, np.load(first) as given:
            np.testing.assert_allclose(exported["mu"], given["mu"])

    def test_a_damaged_file_is_listed_as_such(self, cmbench: Cmbench, workspace: Workspace) -> None:
        folder = workspace.root / "references"
        folder.mkdir(parents=True)
        (folder / "broken.safetensors").write_bytes(b"x")
        listed = cmbench("refs", "list")
        assert listed.code == 0
        assert "damaged" in listed.out
        assert "cannot be read" in listed.err

    def test_mistakes_are_one_line(self, cmbench: Cmbench, tmp_path: Path) -> None:
        unknown = cmbench("refs", "show", "nothing")
        assert unknown.code == 2
        assert "'nothing': does not exist; allowed: none yet" in unknown.err
        missing = cmbench("refs", "import", str(tmp_path / "absent.npz"))
        assert missing.code == 4
        assert "absent.npz: does not exist" in missing.err


def test_prepare_installs_only_verified_weights(
    cmbench: Cmbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "file").write_bytes(b"not the weights")
    refused = cmbench("prepare", "inception", "--from", str(tmp_path / "file"))
    assert refused.code == 2
    assert "nothing was installed" in refused.err
    # DINOv2's publisher names no hash: the file is taken, and its own hash is printed.
    taken = cmbench("prepare", "dinov2", "--from", str(tmp_path / "file"))
    assert taken.code == 0, taken.err
    assert "no published hash to verify" in taken.out
    assert "inception" in cmbench("prepare").out


def test_weights_lie_with_the_data(
    cmbench: Cmbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"anything")
    place = tmp_path / "elsewhere"
    options = ("--from", str(tmp_path / "file"), "--data-dir", str(place))
    assert cmbench("prepare", "dinov2", *options).code == 0
    monkeypatch.setenv("CMBENCH_DATA", str(place))
    found = find_weights("dinov2")
    assert found.parent == place / "weights" == weights_folder()
    assert found.read_bytes() == b"anything"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--range", "a"), "--range: 'a'; allowed: -1,1 | 0,1 | 0,255"),
        (("--range", "0,1"), "are a npz whose pixels need no range"),
        (("--steps", "3"), "--steps: samples "),
        (("--quantize", "foo"), "choose one of them"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    cmbench: Cmbench, noisy: Path, options: tuple[str, ...], said: str
) -> None:
    done = cmbench("eval", str(noisy), "--dataset", "digits", "-q", *options)
    assert done.code == 2
    assert said in done.err


def test_observers_see_what_is_scored_once(
    noisy: Path, toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def notify(self: Context, hook: str, **arguments: Any) -> None:
        seen.append(f"{hook} {arguments['record'].method}")

    monkeypatch.setattr(Context, "notify", notify)
    record = score(toys, ScoreRequest(samples=str(noisy), dataset="digits", label="mine", nfe=1))
    for _ in range(2):
        assert keep_first(toys, record, "cmbench eval").path is not None
    assert seen == ["cmbench_cell_finished mine"]
