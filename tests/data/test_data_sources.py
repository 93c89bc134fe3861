from __future__ import annotations

import os
import pickle
import random
import re
import tarfile
import zipfile
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from dataset_builders import (
    CLASSES,
    add_bytes,
    cifar_archive,
    class_folder,
    edm_zip,
    encode,
    image_tar,
    pictures,
)

from cmbench.data.sources.archives import TarSource, ZipSource
from cmbench.data.sources.base import EncodedSource
from cmbench.data.sources.batches import CifarPythonSource, ImageNetBatchSource
from cmbench.data.sources.detect import open_source
from cmbench.data.sources.folder import FolderSource
from cmbench.data.sources.lmdb import LmdbSource
from cmbench.errors import MissingError, UserError

LABELS = [2, 0, 1, 1, 0, 2]


def read_all(source: EncodedSource) -> list[bytes]:
    index, reader = source.index(), source.reader()
    try:
        return [reader.read(locator) for locator in index.locators]
    finally:
        reader.close()


# ---- zip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_edm_zip(tmp_path: Path, compression: int) -> None:
    images = pictures(6)
    source = open_source(edm_zip(tmp_path / "a.zip", images, LABELS, compression=compression))
    assert isinstance(source, ZipSource)
    assert source.index().labels == LABELS
    assert read_all(source) == [encode(i, compress_level=0) for i in images]


@pytest.mark.parametrize("table", [{"labels": None}, None])
def test_a_zip_without_labels_has_none(tmp_path: Path, table: object) -> None:
    index = ZipSource(edm_zip(tmp_path / "a.zip", pictures(6), None, table=table)).index()
    assert index.labels is None  # and EDM's numbered folders are no classes
    assert len(index) == 6


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"dataset.json has no 'labels'"),
        ([], r"dataset.json has no 'labels'"),
        ({"labels": [3]}, r"not pairs of name and class"),
        ({"labels": [["00000/img00000000.png", 1]]}, r"no label for 5 of 6 images, .*00001.png"),
        ({"labels": [[f"00000/img{i:08d}.png", [0, 1]] for i in range(6)]}, r"not a class number"),
        ({"labels": [[f"00000/img{i:08d}.png", 0.5] for i in range(6)]}, r"label 0.5 of"),
    ],
)
def test_a_bad_table_of_labels_is_described(tmp_path: Path, table: object, message: str) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), LABELS, table=table)
    with pytest.raises(UserError, match=message):
        ZipSource(path).index()


def test_a_dataset_json_that_is_no_json(tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(2), None, table=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("dataset.json", "{")
    with pytest.raises(UserError, match=r"dataset.json: is not JSON"):
        ZipSource(path).index()


def test_a_zip_of_class_folders(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "test"):
            for i, image in enumerate(pictures(6)):
                archive.writestr(f"all/{split}/{CLASSES[i % 3]}/{i}.png", encode(image))
    index = ZipSource(path).index()
    assert list(index.class_names) == list(CLASSES)
    assert index.labels == [0, 0, 1, 1, 2, 2]
    assert index.names[0] == "ant/0.png"
    assert len(ZipSource(path, "test").index()) == 6
    with pytest.raises(UserError, match=r"has no folder 'val'; allowed: test, train"):
        ZipSource(path, "val").index()


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_zip(tmp_path: Path, keep: float) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), LABELS)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=r"truncated or corrupt archive .*download it again"):
        ZipSource(path).index()


def test_damage_anywhere_in_the_table_of_a_zip_is_one_line(tmp_path: Path) -> None:
    """Whatever a byte is changed to, the archive is read or refused in one line."""
    whole = edm_zip(tmp_path / "a.zip", pictures(2), [0, 1]).read_bytes()
    damaged = tmp_path / "b.zip"
    for place in range(whole.find(b"PK\x01\x02"), len(whole)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(whole)
            changed[place] ^= flip
            damaged.write_bytes(changed)
            with suppress(UserError):
                read_all(ZipSource(damaged))


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), LABELS)
    data = bytearray(path.read_bytes())
    data[data.find(b"IDAT") + 30] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"member '00000/img00000000.png' is damaged"):
        read_all(ZipSource(path))


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * 1_000_000)
    data = path.read_bytes().replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"member 'a.png' is damaged"):
        read_all(ZipSource(path))


# ---- folder ------------------------------------------------------------------------------------


def test_class_folders_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    labels = class_folder(tmp_path, pictures(7), ("zebra", "ant", "bee"))
    index = FolderSource(tmp_path).index()
    assert list(index.class_names) == ["ant", "bee", "zebra"]
    assert len(index) == len(labels)
    assert index.labels == [0, 0, 1, 1, 2, 2, 2]


def test_train_and_test_are_never_mixed(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", pictures(6))
    class_folder(tmp_path / "test", pictures(3))
    assert len(FolderSource(tmp_path).index()) == 6
    assert len(FolderSource(tmp_path, "test").index()) == 3
    with pytest.raises(UserError, match=r"has no subfolder 'val'; allowed: test, train"):
        FolderSource(tmp_path, "val")


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i, image in enumerate(pictures(3)):
        (tmp_path / f"{i}.png").write_bytes(encode(image))
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    index = FolderSource(tmp_path).index()
    assert (len(index), index.labels) == (3, None)


def test_a_folder_with_a_table_of_labels(tmp_path: Path) -> None:
    for i, image in enumerate(pictures(3)):
        (tmp_path / f"{i}.png").write_bytes(encode(image))
    (tmp_path / "dataset.json").write_text('{"labels": [["2.png", 5], ["0.png", 1], ["1.png", 3]]}')
    assert FolderSource(tmp_path).index().labels == [1, 3, 5]
    (tmp_path / "dataset.json").write_text("nonsense")
    with pytest.raises(UserError, match=r"dataset.json: is not JSON"):
        FolderSource(tmp_path).index()


@pytest.mark.parametrize("change", [b"more", b"", b"the same size!!!"])
def test_a_file_that_changed_since_it_was_listed_is_read_whole(
    tmp_path: Path, change: bytes
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"0123456789abcdef")
    source = FolderSource(tmp_path)
    locator = source.index().locators[0]
    assert source.reader().read(locator) == path.read_bytes()
    path.write_bytes(path.read_bytes() + change if change == b"more" else change)
    assert source.reader().read(locator) == path.read_bytes()


def test_an_encrypted_or_oddly_packed_table_of_labels(tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(3), None, table=None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("dataset.json", '{"labels": null}')
    with pytest.raises(UserError, match=r"'dataset.json' is packed by method 12"):
        ZipSource(path).index()
    data = bytearray(path.read_bytes())
    row = data.rfind(b"PK\x01\x02")
    data[row + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"'dataset.json' is encrypted; decrypt the archive first"):
        ZipSource(path).index()
    data[row + 6] = 99  # a version of the format that nobody knows yet
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.zip: cannot be read: zip file version 9.9; repack"):
        ZipSource(path).index()


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no images; allowed: .bmp"):
        FolderSource(tmp_path).index()


# ---- tar ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_tar_packed_or_not(tmp_path: Path, mode: str) -> None:
    images = pictures(6)
    suffix = mode.replace("w", "tar").replace(":", ".")
    path = image_tar(tmp_path / f"a.{suffix}", images, mode=mode)
    source = open_source(path, spool=tmp_path / "spool")
    assert isinstance(source, TarSource)
    assert read_all(source) == [encode(images[i]) for i in (0, 3, 1, 4, 2, 5)]
    assert source.index().labels == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_a_truncated_tar(tmp_path: Path, mode: str, keep: float) -> None:
    path = image_tar(tmp_path / "a.tar", pictures(40), mode=mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=r"truncated or corrupt archive"):
        open_source(path, spool=tmp_path / "spool").index()  # type: ignore[attr-defined]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


# ---- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_the_cifar_archive(tmp_path: Path, protocol: int) -> None:
    images = pictures(12, 32)
    path = cifar_archive(
        tmp_path / "cifar-10-python.tar.gz", images, [i % 10 for i in range(12)], protocol
    )
    source = open_source(path)
    assert isinstance(source, CifarPythonSource)
    chunks = list(source.chunks())
    found = np.concatenate([c.images for c in chunks])
    assert np.array_equal(found, images.transpose(0, 3, 1, 2))
    assert [y for c in chunks for y in c.labels.tolist()] == [i % 10 for i in range(12)]
    assert source.remark == "altered"


def test_the_unpacked_cifar_archive(tmp_path: Path) -> None:
    path = cifar_archive(tmp_path / "c.tar.gz", pictures(12, 32), [0] * 12)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    assert isinstance(open_source(tmp_path), CifarPythonSource)
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(UserError, match=r"lacks data_batch_4"):
        list(open_source(tmp_path).chunks())  # type: ignore[attr-defined]


def bad_cifar(path: Path, batch: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for i in range(1, 6):
            add_bytes(archive, f"cifar-10-batches-py/data_batch_{i}", batch)
    return path


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], r"data_batch_1 holds .*list"),
        ({"labels": []}, r"data_batch_1 holds labels; allowed: data, labels"),
        ({"data": np.zeros((2, 12), np.uint8), "labels": [0, 0]}, r"uint8 data of shape \(2, 12\)"),
        ({"data": np.zeros((2, 3072)), "labels": [0, 0]}, r"float64 data"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, r"labels of shape \(1,\)"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0.5]}, r"float64 labels"),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [9, 10]},
            r"data_batch_1 holds label 10 \(of its image 1\); allowed: 0 … 9; give --source",
        ),
        (Path("/"), r"refused: the pickle asks for pathlib"),
    ],
)
def test_bad_batches_are_described(tmp_path: Path, batch: object, message: str) -> None:
    path = bad_cifar(tmp_path / "cifar-10-python.tar.gz", pickle.dumps(batch))
    with pytest.raises(UserError, match=message):
        list(CifarPythonSource(path).chunks())


def test_a_cifar_archive_that_is_cut_or_lacks_a_batch(tmp_path: Path) -> None:
    path = cifar_archive(tmp_path / "cifar-10-python.tar.gz", pictures(12, 32), [0] * 12)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"truncated or corrupt archive"):
        list(CifarPythonSource(path).chunks())
    with tarfile.open(path, "w:gz") as archive:
        add_bytes(archive, "cifar-10-batches-py/data_batch_2", b"")
    with pytest.raises(UserError, match=r"lacks data_batch_1, data_batch_3"):
        list(CifarPythonSource(path).chunks())


def test_imagenet_batches(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (3, 12288), dtype=np.uint8)
    for i in (10, 2, 1):  # numbers, not names, give the order
        np.savez(
            tmp_path / f"train_data_batch_{i}.npz",
            data=rows + i,
            labels=[1, 5, 1000],
            mean=np.zeros(12288),
        )
    source = open_source(tmp_path)
    assert isinstance(source, ImageNetBatchSource)
    assert source.total == 9
    assert source.missing == [f"train_data_batch_{i}" for i in range(3, 10)]
    chunks = list(source.chunks())
    assert [int(c.images[0, 0, 0, 0]) - int(rows[0, 0]) for c in chunks] == [1, 2, 10]
    assert chunks[0].labels is not None
    assert chunks[0].labels.tolist() == [0, 4, 999]
    for path in tmp_path.iterdir():
        with np.load(path) as batch:
            plain = {"data": batch["data"], "labels": batch["labels"].tolist()}
        path.with_suffix("").write_bytes(pickle.dumps(plain))
        path.unlink()
    pickled = list(open_source(tmp_path).chunks())  # type: ignore[attr-defined]
    assert all(np.array_equal(a.images, b.images) for a, b in zip(chunks, pickled, strict=True))


def test_a_truncated_npz(tmp_path: Path) -> None:
    path = tmp_path / "train_data_batch_1.npz"
    np.savez(path, data=np.zeros((3, 12288), np.uint8), labels=[1, 2, 3])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"batch_1.npz: cannot be read: File is not a zip"):
        open_source(tmp_path)


def test_labels_that_imagenet_batches_cannot_have(tmp_path: Path) -> None:
    for label in (0, 1001):  # they count from 1
        np.savez(
            tmp_path / "train_data_batch_1.npz",
            data=np.zeros((2, 12288), np.uint8),
            labels=[1, label],
        )
        message = rf"train_data_batch_1.npz holds label {label} .*image 1\); allowed: 1 … 1000"
        with pytest.raises(UserError, match=message):
            list(ImageNetBatchSource(tmp_path).chunks())


def test_an_npz_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "train_data_batch_1.npz"
    lie = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000000000, 12288), }".ljust(117)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", b"\x93NUMPY\x01\x00v\x00" + lie + b"\n")
        with archive.open("labels.npy", "w") as file:
            np.save(file, np.ones(3))
    with pytest.raises(UserError, match=r"batch_1.npz: cannot be read: .* claims an array"):
        list(ImageNetBatchSource(tmp_path).chunks())


def test_an_npz_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_data_batch_1.npz"
    np.savez(path, data=np.array([{"a": 1}], dtype=object), labels=[1])
    with pytest.raises(UserError, match="Object arrays are not read"):
        list(open_source(tmp_path).chunks())  # type: ignore[attr-defined]


# ---- lmdb --------------------------------------------------------------------------------------


def test_an_lmdb(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")
    images = pictures(5)
    with (
        lmdb.open(str(tmp_path), map_size=1 << 20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for i, image in enumerate(images):
            transaction.put(f"{i:040d}".encode(), encode(image, "webp", lossless=True))
    source = open_source(tmp_path)
    assert source.kind == "lmdb"
    assert isinstance(source, EncodedSource)
    assert read_all(source) == [encode(i, "webp", lossless=True) for i in images]
    data = (tmp_path / "data.mdb").read_bytes()
    (tmp_path / "data.mdb").write_bytes(b"\0" * len(data))
    with pytest.raises(UserError, match=r"truncated or corrupt database"):
        open_source(tmp_path).index()  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_an_lmdb_that_is_cut(tmp_path: Path, keep: float) -> None:
    # To read beyond its end would be the end of the process.
    lmdb = pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")
    with (
        lmdb.open(str(tmp_path), map_size=8 << 20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for i in range(1000):
            transaction.put(f"{i:040d}".encode(), bytes(2000))
    assert len(LmdbSource(tmp_path).index()) == 1000
    size = (tmp_path / "data.mdb").stat().st_size
    os.truncate(tmp_path / "data.mdb", int(keep * size))
    message = rf"truncated database: data.mdb takes {int(keep * size):,} bytes; allowed: [\d,]+ by"
    with pytest.raises(UserError, match=message):
        LmdbSource(tmp_path).index()


@pytest.mark.parametrize("seed", range(4))
def test_an_lmdb_is_read_as_its_library_does(tmp_path: Path, seed: int) -> None:
    """Trees of several levels, values of any size, keys that were removed again."""
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    rng = random.Random(seed)
    with lmdb.open(str(tmp_path), map_size=64 << 20) as environment:
        keys = [rng.randbytes(rng.randint(1, 60)) for _ in range(3000)]
        with environment.begin(write=True) as transaction:
            for key in keys:
                size = rng.choice((0, 1, 100, 2021, 2022, 2023, 5000))
                transaction.put(key, rng.randbytes(size))
        with environment.begin(write=True) as transaction:
            for key in keys[:: 2 + seed]:
                transaction.delete(key)
        with environment.begin() as transaction:
            wanted = list(transaction.cursor())
    source = LmdbSource(tmp_path)
    index, reader = source.index(), source.reader()
    assert [reader.read(place) for place in index.locators] == [value for _, value in wanted]
    assert index.names == [key.decode("utf-8", "backslashreplace") for key, _ in wanted]
    reader.close()


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_lmdb_is_one_clear_line(tmp_path: Path, seed: int) -> None:
    """Page numbers, offsets and sizes lead nowhere: the process lives."""
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    rng, path = random.Random(seed), tmp_path / "data.mdb"
    with (
        lmdb.open(str(tmp_path), map_size=1 << 20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for i in range(200):
            transaction.put(f"{i:010d}".encode(), bytes(50 if i % 2 else 3000))
    data = bytearray(path.read_bytes())
    starts = [start for start in range(0, len(data), 4096) if any(data[start : start + 4096])]
    for _ in range(3):  # in what says where things are: the beginnings of pages
        place = rng.choice(starts) + rng.randrange(8, 160)
        data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", rng.randbytes(4), bytes(4)))
    path.write_bytes(data)
    source = LmdbSource(tmp_path)
    try:
        places = source.index().locators
    except UserError as error:
        places, line = [], str(error)
        clear = re.search("truncated or corrupt database|truncated database|is empty", line)
        assert clear, line
    with closing(source.reader()) as reader:
        assert all(len(reader.read(place)) == place[1] for place in places)


# ---- detection ---------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"--source: .*gone does not exist"):
        open_source(tmp_path / "gone")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"hello there", r"has no format that can be read; allowed: a folder")],
)
def test_a_file_of_no_known_kind(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.dat").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.dat")
