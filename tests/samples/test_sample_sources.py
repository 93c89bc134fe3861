from __future__ import annotations

import io
import json
import sys
import tomllib
import tracemalloc
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cmbench.errors import MissingError, NonFiniteError, UserError
from cmbench.samples.generators import GeneratorSamples
from cmbench.samples.opening import open_samples
from cmbench.samples.source import ReadOptions, prefetched

GREY = ReadOptions(channels=1)


def pixels(count: int, size: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    return (
        np.random.RandomState(seed).randint(0, 256, (count, size, size, channels)).astype(np.uint8)
    )


def write_folder(folder: Path, images: np.ndarray[Any, Any], **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    suffix = options.pop("suffix", "png")
    for number, image in enumerate(images):
        picture = Image.fromarray(image.squeeze())
        picture.save(folder / f"{number:05}.{suffix}", **options)
    return folder


def read(path: Any, options: ReadOptions | None = None, batch: int = 4) -> tuple[Tensor, Any, Any]:
    source = open_samples(str(path), options)
    images, labels = [], []
    for found in source.batches(batch):
        assert found.first == sum(map(len, images))
        images.append(found.images)
        if found.labels is not None:
            labels.append(found.labels)
    assert source.count == sum(map(len, images))
    return torch.cat(images), torch.cat(labels).tolist() if labels else None, source.notes


def channels_first(images: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class TestImages:
    def test_a_folder_of_png_is_read_exactly(self, tmp_path: Path) -> None:
        images = pixels(9)
        found, labels, notes = read(write_folder(tmp_path / "s", images))
        assert torch.equal(found, channels_first(images))
        assert labels is None
        assert notes == []
        limited = ReadOptions(limit=5)
        assert len(read(tmp_path / "s", limited)[0]) == 5

    def test_class_folders_and_grey_data(self, tmp_path: Path) -> None:
        for number in range(3):
            write_folder(tmp_path / "s" / f"class{number}", pixels(2, channels=1, seed=number))
        found, labels, notes = read(tmp_path / "s", GREY)
        assert found.shape == (6, 1, 6, 6)
        assert labels == [0, 0, 1, 1, 2, 2]
        assert notes == []

    def test_an_edm_zip_with_labels(self, tmp_path: Path) -> None:
        images = pixels(5)
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
            table = []
            for number, image in enumerate(images):
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, "png")
                name = f"00000/img{number:08}.png"
                archive.writestr(name, stream.getvalue())
                table.append([name, 9 - number])
            archive.writestr("dataset.json", json.dumps({"labels": table}))
        found, labels, _ = read(tmp_path / "s.zip")
        assert torch.equal(found, channels_first(images))
        assert labels == [9, 8, 7, 6, 5]

    @pytest.mark.parametrize(
        ("suffix", "options", "lossy"),
        [
            ("jpg", {}, True),
            ("webp", {"lossless": False}, True),
            ("webp", {"lossless": True}, False),
            ("bmp", {}, False),
        ],
    )
    def test_lossy_files_are_said_aloud(
        self, tmp_path: Path, suffix: str, options: dict[str, Any], lossy: bool
    ) -> None:
        folder = write_folder(tmp_path / "s", pixels(3), suffix=suffix, **options)
        _, _, notes = read(folder)
        assert (notes != []) == lossy
        if lossy:
            assert "3 of 3 samples are JPEG or another lossy format" in notes[0]

    def test_grey_palette_and_opaque_alpha_are_converted_and_noted(self, tmp_path: Path) -> None:
        grey = write_folder(tmp_path / "grey", pixels(2, channels=1))
        found, _, notes = read(grey)
        assert torch.equal(found[:, 0], found[:, 2])
        assert "2 of 2 samples are grey" in notes[0]
        images = pixels(2, channels=4)
        images[..., 3] = 255
        found, _, notes = read(write_folder(tmp_path / "alpha", images))
        assert torch.equal(found, channels_first(images[..., :3]))
        assert "opaque alpha channel" in notes[0]
        (tmp_path / "palette").mkdir()
        Image.fromarray(pixels(1)[0]).quantize(16).save(tmp_path / "palette" / "0.png")
        assert "have a palette" in read(tmp_path / "palette")[2][0]

    def test_what_cannot_be_scored_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="holds no images"):
            read(tmp_path / "empty")
        see_through = write_folder(tmp_path / "alpha", pixels(1, channels=4))
        with pytest.raises(UserError, match=r"'00000\.png' is transparent.*composite"):
            read(see_through)
        mixed = write_folder(tmp_path / "mixed", pixels(2))
        Image.fromarray(pixels(1, size=7)[0]).save(mixed / "00002.png")
        with pytest.raises(UserError, match=r"mixed sizes: 00000\.png is 6x6, 00002\.png is 7x7"):
            read(mixed)
        cut = write_folder(tmp_path / "cut", pixels(2))
        (cut / "00001.png").write_bytes((cut / "00001.png").read_bytes()[:60])
        with pytest.raises(UserError, match=r"'00001\.png' cannot be decoded"):
            read(cut)
        (cut / "00001.png").write_bytes(b"not an image")
        with pytest.raises(UserError, match=r"'00001\.png' cannot be decoded"):
            read(cut)
        deep = tmp_path / "deep"
        deep.mkdir()
        Image.fromarray(np.zeros((6, 6), np.uint16)).save(deep / "0.png")
        with pytest.raises(UserError, match=r"more than 8 bits \(mode I;16.*allowed: 8 bits"):
            read(deep)
        with pytest.raises(UserError, match=r"has colours \(mode RGB\); allowed: grey"):
            read(write_folder(tmp_path / "colour", pixels(1)), GREY)


class TestArrays:
    def test_openai_batch(self, tmp_path: Path) -> None:
        images = pixels(7)
        np.savez(tmp_path / "s.npz", images, np.arange(7))
        found, labels, notes = read(tmp_path / "s.npz")
        assert torch.equal(found, channels_first(images))
        assert labels == list(range(7))
        assert notes == []

    @settings(max_examples=30)
    @given(
        count=st.integers(1, 9),
        size=st.integers(4, 9),
        channels=st.sampled_from([1, 3]),
        last=st.booleans(),
        batch=st.integers(1, 12),
    )
    def test_either_layout(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        count: int,
        size: int,
        channels: int,
        last: bool,
        batch: int,
    ) -> None:
        path = tmp_path_factory.mktemp("npy") / "s.npy"
        images = pixels(count, size, channels)
        np.save(path, images if last else images.transpose(0, 3, 1, 2))
        found, _, _ = read(path, ReadOptions(channels=channels), batch)
        assert torch.equal(found, channels_first(images))

    def test_grey_arrays_become_rgb_with_a_note(self, tmp_path: Path) -> None:
        np.save(tmp_path / "s.npy", pixels(3, channels=1)[..., 0])
        found, _, notes = read(tmp_path / "s.npy")
        assert found.shape == (3, 3, 6, 6)
        assert notes == ["samples are grey (made RGB by repeating the channel)"]

    @pytest.mark.parametrize(("name", "low", "high"), [("-1,1", -1, 1), ("0,1", 0, 1)])
    def test_floats_need_their_range_said(
        self, tmp_path: Path, name: str, low: float, high: float
    ) -> None:
        values = np.random.RandomState(0).uniform(low, high, (6, 5, 5, 3)).astype(np.float32)
        np.savez(tmp_path / "s.npz", images=values)
        with pytest.raises(UserError, match=r"float pixels from .* is not given.*--range"):
            read(tmp_path / "s.npz")
        found, _, notes = read(tmp_path / "s.npz", ReadOptions(value_range=name))
        wanted = (channels_first(values) - low) / (high - low) * 2 - 1
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert "quantized here, not by their generator" in notes[0]

    def test_what_cannot_be_scored_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "s.npy"

        def refuse(array: Any, words: str, options: ReadOptions | None = None) -> None:
            np.save(path, array)
            with pytest.raises(UserError, match=words):
                read(path, options)

        floats = np.random.RandomState(0).uniform(-1, 1, (4, 5, 5, 3))
        refuse(floats, r"pixels from -.*given as \[0,1\]", ReadOptions(value_range="0,1"))
        refuse(floats, "range '0,2'; allowed: -1,1", ReadOptions(value_range="0,2"))
        floats[2, 1, 1, 0] = np.inf
        refuse(floats, "image 2 holds NaN or infinite", ReadOptions(value_range="-1,1"))
        refuse(pixels(4).astype(np.int64), "pixels of int64; allowed: uint8")
        refuse(pixels(4, channels=4), r"four channels.*alpha")
        refuse(pixels(4, channels=2), "3 channels, second or last")
        refuse(np.zeros((0, 5, 5, 3), np.uint8), "N > 0")
        refuse(np.zeros((5, 5), np.uint8), r"\(5, 5\)")
        refuse(np.zeros((2, 3, 3, 3), np.uint8), "3 channels, second or last")
        refuse(pixels(4), "3 channels; allowed: 1", GREY)
        path.write_bytes(b"x")
        with pytest.raises(UserError, match="cannot be read"):
            read(path)
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(UserError, match="cannot be read"):
            read(path)
        np.savez(tmp_path / "s.npz", other=pixels(2))
        with pytest.raises(UserError, match="holds other; allowed: one of arr_0"):
            read(tmp_path / "s.npz")

    def test_odd_labels_are_left_out_with_a_note(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "s.npz", pixels(4), np.eye(4, dtype=np.float32))
        _, labels, notes = read(tmp_path / "s.npz")
        assert labels is None
        assert "labels were not read: shape (4, 4) and float32, where 4 images need" in notes[0]


class TestGenerators:
    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def read(self, name: str, **options: Any) -> tuple[Tensor, Any, Any]:
        return read(f"entry_points:{name}", ReadOptions(channels=1, limit=10, **options))

    def test_a_good_one(self) -> None:
        found, labels, notes = self.read("good")
        assert found.shape == (10, 1, 8, 8)
        assert labels is None
        assert notes == []
        assert not torch.equal(found, self.read("good", seed=1)[0])
        found, labels, notes = self.read("labelled")
        assert found.dtype == torch.uint8
        assert labels == list(range(10))
        assert self.read("evaluated")[2] == []

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("unseeded", "gave other images"),
            ("one_stream", "an image changes with what shares its batch"),
            ("unit_range", "are they meant for [-1, 1]"),
        ],
    )
    def test_oddities_are_noted(self, name: str, words: str) -> None:
        (note,) = self.read(name)[2]
        assert words in note

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("training", r"BatchNorm layers are in training mode.*eval"),
            ("byte_range", r"floats from .* allowed: \[-1, 1\]"),
            ("diverged", "NaN or infinite"),
            ("integers", r"images of torch\.int32"),
            ("too_few", r"shape \(1, 1, 8, 8\) for 4 samples"),
            ("nothing", "returned NoneType"),
            ("number", "is a int; allowed: a function"),
            ("absent", "cannot be imported: AttributeError"),
        ],
    )
    def test_mistakes_are_errors(self, name: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            self.read(name)

    def test_what_it_raises_is_one_line(self) -> None:
        with pytest.raises(
            UserError, match=r"raised for 4 samples: RuntimeError: out of luck; all"
        ):
            self.read("raises")

    def test_divergence_has_its_own_kind(self) -> None:
        with pytest.raises(NonFiniteError):
            self.read("diverged")

    def test_a_module_that_is_not_there(self) -> None:
        with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
            read("no_such_module_anywhere:f")


def write_index(folder: Path, **changes: Any) -> None:
    """Write a pipeline's index, as diffusers does but for the changes."""
    index = {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"], "odd": [None] * 2}
    (folder / "model_index.json").write_text(json.dumps(index | changes))


class TestDiffusers:
    RUN = ReadOptions(limit=5, steps=2, run_pipeline=True)

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "diffusers", None)
        write_index(tmp_path)
        with pytest.raises(MissingError, match=r"diffusers is not installed.*pip install"):
            open_samples(str(tmp_path), self.RUN)

    def test_a_pipeline_is_not_run_unasked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "diffusers", None)
        write_index(tmp_path)
        message = (
            r"is a diffusers pipeline \(DDIMPipeline\).* --run-pipeline; nothing of it was run"
        )
        with pytest.raises(UserError, match=message):
            open_samples(str(tmp_path))

    @pytest.mark.parametrize(
        "index",
        [
            {"_class_name": ["evil", "Pipeline"]},
            {"unet": ["evil", "Model"]},
            {"unet": ["os", "system"]},
            {"unet": ["stable_diffusion", "SafetyChecker"]},
            {"unet": ["transformers", "AutoModel"]},
            {"unet": ["diffusers", ["a", "b"]]},
            {"unet": ["diffusers", "UNet2DModel", "more"]},
            {"../unet": ["diffusers", "UNet2DModel"]},
            {"unet": ["evil"]},
            {"unet": []},
        ],
    )
    @pytest.mark.parametrize("asked", [False, True])
    def test_code_of_the_folder_is_refused_before_anything_is_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, Any], asked: bool
    ) -> None:
        flag = tmp_path / "owned"
        for name in ("evil.py", "unet/evil.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"open({str(flag)!r}, 'w')")
        write_index(tmp_path, **index)
        monkeypatch.setitem(sys.modules, "diffusers", None)  # opening it would say that
        options = ReadOptions(run_pipeline=asked)
        with pytest.raises(UserError, match=r"names code that is not of diffusers: .*was run"):
            open_samples(str(tmp_path), options)
        assert not flag.exists()

    @pytest.mark.parametrize(
        "index",
        [
            {"_class_name": "UNet2DModel"},
            {"_class_name": "NoSuchPipeline"},
            {"unet": ["diffusers", "DDIMPipeline"]},
            {"unet": ["diffusers", "utils"]},
            {"unet": ["diffusers", "AutoModel"]},
            {"scheduler": ["diffusers", "__class__"]},
        ],
    )
    def test_classes_that_diffusers_does_not_have(
        self, tmp_path: Path, index: dict[str, Any]
    ) -> None:
        pytest.importorskip("diffusers", reason="needs the extra `diffusers`")
        write_index(tmp_path, **index)
        with pytest.raises(UserError, match=r"names \w+ = '\w+', which diffusers .* does not have"):
            open_samples(str(tmp_path), self.RUN)

    @pytest.mark.parametrize(
        ("text", "message"), [("{", "is not JSON"), ("{}", "no _class_name"), ("3", "no _class")]
    )
    def test_a_broken_index(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(UserError, match=rf"model_index.json.*{message}"):
            open_samples(str(tmp_path))

    def test_the_oldest_allowed_diffusers_runs_no_code_of_a_folder(self) -> None:
        table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
        (needed,) = table["project"]["optional-dependencies"]["diffusers"]
        assert tuple(map(int, needed.removeprefix("diffusers>=").split("."))) >= (0, 36)

    def test_a_real_pipeline(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers", reason="needs the extra `diffusers`")
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        network = diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            **blocks,
        )
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=20)
        diffusers.DDIMPipeline(network, scheduler).save_pretrained(tmp_path)
        found, _, notes = read(tmp_path, self.RUN, batch=2)
        again, _, _ = read(tmp_path, self.RUN, batch=5)
        torch.testing.assert_close(found, again, rtol=0, atol=1e-5)
        assert found.shape == (5, 3, 8, 8)
        assert notes == []

    def test_its_interface(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stand-in with diffusers' documented interface; image i follows its own generator."""
        calls: dict[str, Any] = {}

        class Pipeline:
            def set_progress_bar_config(self, *, disable: bool) -> None:
                calls["quiet"] = disable

            def __call__(
                self,
                batch_size: int,
                generator: list[torch.Generator],
                num_inference_steps: int = 50,
                output_type: str = "pil",
            ) -> Any:
                calls["steps"], calls["type"] = num_inference_steps, output_type
                rows = [torch.rand(6, 6, 3, generator=g) for g in generator]
                return types.SimpleNamespace(images=torch.stack(rows).numpy())

        def from_pretrained(path: str, **options: Any) -> Pipeline:
            calls["options"] = options
            if path.endswith("broken"):
                raise OSError("no file named model_index.json")
            return Pipeline()

        module = types.ModuleType("diffusers")
        module.__version__ = "9"  # type: ignore[attr-defined]
        base = {"from_pretrained": staticmethod(from_pretrained)}
        module.DiffusionPipeline = type("DiffusionPipeline", (), base)  # type: ignore[attr-defined]
        for name in ("DDIMPipeline", "ModelMixin", "SchedulerMixin", "UNet2DModel"):
            parent = {"DDIMPipeline": "DiffusionPipeline", "UNet2DModel": "ModelMixin"}.get(name)
            parents = (getattr(module, parent),) if parent else ()
            setattr(module, name, type(name, parents, {}))
        monkeypatch.setitem(sys.modules, "diffusers", module)
        write_index(tmp_path)
        options = ReadOptions(limit=7, steps=2, run_pipeline=True)
        found, _, notes = read(tmp_path, options, batch=3)
        again, _, _ = read(tmp_path, options, batch=7)
        assert torch.equal(found, again)
        assert found.shape == (7, 3, 6, 6)
        assert float(found.min()) < -0.9
        assert notes == []
        assert calls["steps"] == 2
        assert calls["type"] == "np"
        assert calls["quiet"] is True
        assert calls["options"] == {"local_files_only": True, "use_safetensors": True}
        broken = tmp_path / "broken"
        broken.mkdir()
        write_index(broken)
        with pytest.raises(UserError, match="cannot be opened: OSError: no file named"):
            open_samples(str(broken), self.RUN)


def test_unknown_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"does not exist.*allowed: a folder, \.zip"):
        open_samples(str(tmp_path / "absent"))
    (tmp_path / "s.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a \.tar file; allowed: a folder"):
        open_samples(str(tmp_path / "s.tar"))


class TestPrefetch:
    def test_keeps_order_and_passes_errors_on(self) -> None:
        assert list(prefetched(iter(range(20)))) == list(range(20))

        def failing() -> Iterator[int]:
            yield 1
            raise UserError("samples x", "broken")

        found = prefetched(failing())
        assert next(found) == 1
        with pytest.raises(UserError, match="broken"):
            next(found)

    def test_stops_reading_when_nobody_listens(self) -> None:
        made = []

        def endless() -> Iterator[int]:
            for number in range(10**9):
                made.append(number)
                yield number

        found = prefetched(endless())
        assert next(found) == 0
        found.close()
        count = len(made)
        assert count < 10
        assert len(made) == count


def test_undefined_pixels_are_said_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "nan.npy", np.full((2, 8, 8, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="pixels are NaN or infinite"):
        open_samples(str(tmp_path / "nan.npy"))


def test_undecodable_files_are_said_without_internals(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no image of a format that is read") as caught:
        list(open_samples(str(tmp_path)).batches(2))
    assert "BytesIO" not in str(caught.value)


def test_generators_may_return_arrays_and_make_the_protocols_count() -> None:
    def generate(indices: Tensor, seed: int) -> tuple[object, object]:
        grey = np.repeat(indices.numpy().astype(np.uint8), 12).reshape(-1, 3, 2, 2)
        return grey, indices.numpy()

    source = GeneratorSamples("arrays", generate, ReadOptions(protocol_samples=5))
    assert source.count == 5
    (batch,) = source.batches(8)
    images, labels = batch.images, batch.labels
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3, 4]


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the largest memory of NumPy, Pillow's callers and Python while ``call`` runs."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_limit_reads_only_what_it_needs(tmp_path: Path) -> None:
    """64 MiB of zeros in a file of 64 KiB."""
    path, count = tmp_path / "s.npz", 1 << 16
    np.savez_compressed(path, arr_0=np.zeros((count, 32, 32, 1), np.uint8), arr_1=np.arange(count))
    options = ReadOptions(channels=1, limit=10)

    def whole() -> None:
        source = open_samples(str(path), options)
        assert source.count == 10
        (batch,) = source.batches(100)
        assert batch.images.shape == (10, 1, 32, 32)
        assert batch.labels is not None
        assert batch.labels.tolist() == list(range(10))

    assert peak_bytes(whole) < 8 << 20


def test_a_limit_with_columns_first(tmp_path: Path) -> None:
    images = pixels(20)
    np.savez(tmp_path / "s.npz", arr_0=np.asfortranarray(images))
    found, _, _ = read(tmp_path / "s.npz", ReadOptions(limit=3))
    assert torch.equal(found, torch.from_numpy(images[:3]).permute(0, 3, 1, 2))


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("L", (9_400, 9_400)).save(tmp_path / f"{i}.png")
    message = r"image '0.png' has 9,400 x 9,400 pixels; allowed: up to 16,777,216 pixels"

    def refused() -> None:
        with pytest.raises(UserError, match=message):
            list(open_samples(str(tmp_path), GREY).batches(100))

    assert peak_bytes(refused) < 64 << 20


def test_large_pictures_come_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pixels(7)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    monkeypatch.setattr("cmbench.samples.images._BATCH_BYTES", 3 * images[0].size)
    batches = list(open_samples(str(tmp_path)).batches(5))
    assert [(b.first, len(b.images)) for b in batches] == [(0, 3), (3, 3), (6, 1)]
    assert torch.equal(
        torch.cat([b.images for b in batches]), torch.from_numpy(images).permute(0, 3, 1, 2)
    )


def test_two_channels_that_no_picture_has(tmp_path: Path) -> None:
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"'a.png' cannot have 2 channels; allowed: 1 or 3"):
        list(open_samples(str(tmp_path), ReadOptions(channels=2)).batches(4))
