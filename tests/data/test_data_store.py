from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from dataset_builders import class_folder, pictures
from hypothesis import given
from hypothesis import strategies as st

from cmbench.data.layout import Layout
from cmbench.data.locations import DataLocations
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.rules import Rule
from cmbench.data.store import BLOCKS, IMAGES, LABELS, MANIFEST, open_store
from cmbench.data.verify import verify
from cmbench.errors import MissingError, UserError
from cmbench.files import read_sealed, write_sealed
from cmbench.plugin.specs import DatasetSpec

shapes = st.tuples(st.integers(1, 8), st.integers(1, 300), st.integers(1, 300))


@given(shape=shapes, count=st.integers(1, 10_000_000), dtype=st.sampled_from(["uint8", "float32"]))
def test_the_header_is_numpys_and_never_grows(
    shape: tuple[int, int, int], count: int, dtype: str
) -> None:
    header = io.BytesIO(Layout(shape, dtype).header(count))
    assert np.lib.format.read_magic(header) == (1, 0)
    assert np.lib.format.read_array_header_1_0(header) == ((count, *shape), False, np.dtype(dtype))
    assert header.tell() == Layout(shape, dtype).offset(0)


@given(shape=shapes, count=st.integers(1, 5000))
def test_blocks_tile_the_images(shape: tuple[int, int, int], count: int) -> None:
    layout = Layout(shape)
    ranges = [layout.block_range(b, count) for b in range(layout.blocks(count))]
    assert [i for first, stop in ranges for i in range(first, stop)] == list(range(count))
    assert layout.block_images * layout.image_bytes <= max(4 << 20, layout.image_bytes)


@pytest.fixture
def folder(tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations) -> Path:
    class_folder(tmp_path / "source", pictures(30))
    prepare(spec, rule, Request(tmp_path / "source"), locations)
    return locations.folder(spec.name)


def test_what_was_prepared_can_be_opened_with_numpy_alone(folder: Path) -> None:
    images = np.load(folder / IMAGES, allow_pickle=False)
    assert images.shape == (30, 3, 8, 8)
    assert np.array_equal(images, open_store(folder).images)
    assert np.load(folder / LABELS, allow_pickle=False).tolist() == sorted(i % 3 for i in range(30))


def test_reading_never_writes_to_the_file(folder: Path) -> None:
    open_store(folder).images[:] = 0
    assert verify(folder).count == 30


@pytest.mark.parametrize("place", [128, 700, -1])
def test_one_changed_bit_is_found_and_placed(folder: Path, place: int) -> None:
    data = bytearray((folder / IMAGES).read_bytes())
    data[place] ^= 1
    (folder / IMAGES).write_bytes(data)
    with pytest.raises(UserError, match=r"images 0-29 have changed since they were prepared"):
        verify(folder)


def damage_manifest(folder: Path, **changes: object) -> None:
    write_sealed(folder / MANIFEST, read_sealed(folder / MANIFEST) | changes)


def test_damage_gets_one_clear_line(folder: Path) -> None:
    good = {name: (folder / name).read_bytes() for name in (IMAGES, LABELS, BLOCKS, MANIFEST)}

    def check(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            verify(folder)
        assert "cmbench prepare tiny" in str(caught.value)
        for name, data in good.items():
            (folder / name).write_bytes(data)

    (folder / IMAGES).write_bytes(good[IMAGES][:-1])
    check(r"images.npy cannot be read")
    (folder / IMAGES).unlink()
    check(r"images.npy is missing")
    np.save(folder / IMAGES, np.zeros((30, 3, 8, 8), np.float32))
    check(r"images.npy holds float32 \(30, 3, 8, 8\); allowed: uint8")
    np.save(folder / IMAGES, np.array([{"a": 1}]), allow_pickle=True)
    check(r"images.npy cannot be read: .*Python objects")
    np.save(folder / LABELS, np.zeros(30, np.int32))
    check(r"labels.npy does not match its hash")
    (folder / BLOCKS).write_text("0" * 64)
    check(r"blocks.sha256 does not match the manifest")
    (folder / BLOCKS).write_text("zzz")
    check(r"blocks.sha256 holds a line that is not a SHA-256")
    (folder / MANIFEST).write_text("{")
    check(r"manifest.json: is not JSON \(Expecting property name")
    damage_manifest(folder, shape=[1, 2])
    check(r"manifest.json: field 'shape")
    damage_manifest(folder, surprise=1)
    check(r"manifest.json: field 'surprise': Extra inputs")
    damage_manifest(folder, format=2)
    check(r"manifest.json: field 'format")
    (folder / MANIFEST).unlink()
    with pytest.raises(MissingError, match=r"has no manifest.json; run `cmbench prepare tiny`"):
        open_store(folder)
