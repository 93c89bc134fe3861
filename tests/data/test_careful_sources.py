"""Sources that would be misread: wide or transparent pictures, changed files, loops of links."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from dataset_builders import class_folder, edm_zip, image_tar, pictures
from PIL import Image

from cmbench.data.locations import DataLocations
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.rules import Rule
from cmbench.data.sources import archives
from cmbench.data.sources.archives import TarSource, ZipSource
from cmbench.data.sources.batches import CifarPythonSource
from cmbench.data.sources.folder import FolderSource
from cmbench.errors import UserError
from cmbench.plugin.specs import DatasetSpec


def save(path: Path, kind: str) -> None:
    rgb = Image.fromarray(pictures(1)[0])
    if kind == "16-bit":
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    elif kind == "float":
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path, "tiff")
    elif kind == "transparent":
        rgb.putalpha(Image.fromarray(np.full((8, 8), 128, np.uint8)))
        rgb.save(path)
    elif kind == "colour key":
        rgb.save(path, transparency=rgb.getpixel((0, 0)))
    elif kind == "opaque":
        rgb.putalpha(255)
        rgb.save(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("16-bit", "has pixels of more than 8 bits"),
        ("float", "has pixels of more than 8 bits"),
        ("transparent", "is transparent in places"),
        ("colour key", "is transparent in places"),
    ],
)
def test_pictures_that_a_conversion_would_spoil(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, kind: str, message: str
) -> None:
    class_folder(tmp_path, pictures(3))
    save(tmp_path / "bee/odd.png", kind)
    with pytest.raises(UserError, match=rf"image 'bee/odd.png' {message}"):
        prepare(spec, rule, Request(tmp_path), locations)


def test_opaque_pictures_with_alpha_are_taken(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    class_folder(tmp_path, pictures(3))
    save(tmp_path / "bee/odd.png", "opaque")
    manifest, _ = prepare(spec, rule, Request(tmp_path, subset=True), locations)
    assert manifest.converted == {"RGBA": 1}


def test_a_file_of_the_same_size_is_not_the_same(tmp_path: Path) -> None:
    class_folder(tmp_path, pictures(3))
    before = FolderSource(tmp_path).index().fingerprint
    assert FolderSource(tmp_path).index().fingerprint == before
    path = tmp_path / "ant/00000.png"
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
    assert FolderSource(tmp_path).index().fingerprint != before


def test_loops_of_links_end(tmp_path: Path) -> None:
    class_folder(tmp_path, pictures(4))
    names = FolderSource(tmp_path).index().names
    (tmp_path / "ant/up").symlink_to("..")
    (tmp_path / "ant/self").symlink_to("self")
    (tmp_path / "bee/here").symlink_to(".")
    assert FolderSource(tmp_path).index().names == names
    # Links elsewhere are followed, even twice to one place.
    (tmp_path / "dog").symlink_to("ant")
    assert len(FolderSource(tmp_path).index().names) == len(names) + 2


# ---- archives that unpack to far more than they hold -------------------------------------------


def test_a_table_of_labels_out_of_proportion(tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(3), None, table=None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", b" " * (4 << 20))
    with pytest.raises(UserError, match=r"dataset.json takes 4,194,304 bytes .* 3 images"):
        ZipSource(path).index()


def test_a_member_that_no_image_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST_IMAGE", 10_000)
    path = edm_zip(tmp_path / "a.zip", pictures(3), None)
    assert len(ZipSource(path).index().names) == 3
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", b"\0" * 10_001)
    with pytest.raises(UserError, match=r"member 'bomb.png' takes 10,001 bytes; allowed: up to"):
        ZipSource(path).index()


def test_a_batch_that_is_none(tmp_path: Path) -> None:
    from dataset_builders import cifar_archive

    path = cifar_archive(tmp_path / "cifar.tar.gz", pictures(10, 32), [0] * 10)
    list(CifarPythonSource(path).chunks())
    CifarPythonSource.LARGEST_BATCH, before = 100, CifarPythonSource.LARGEST_BATCH
    try:
        with pytest.raises(UserError, match=r"data_batch_1 takes [\d,]+ bytes; allowed: up to 100"):
            list(CifarPythonSource(path).chunks())
    finally:
        CifarPythonSource.LARGEST_BATCH = before


def test_what_was_unpacked_from_one_archive_is_not_taken_for_another(tmp_path: Path) -> None:
    first = image_tar(tmp_path / "a.tar.xz", pictures(4))
    second = image_tar(tmp_path / "b.tar.xz", pictures(4, seed=1))
    spool = tmp_path / "spool.tar"
    fingerprints = [TarSource(p, spool=spool).index().fingerprint for p in (first, second, first)]
    assert len(list(tmp_path.glob("spool*"))) == 1
    unpacked = next(tmp_path.glob("spool*")).read_bytes()
    assert TarSource(first, spool=spool).index().fingerprint == fingerprints[0]
    with tarfile.open(first) as archive:
        member = archive.extractfile("train/ant/00000.png")
        assert member is not None
        assert member.read() in unpacked
    # What a kill leaves of unpacking is not taken for an archive either.
    next(tmp_path.glob("spool*")).rename(tmp_path / "spool.tar-0123.part")
    assert len(TarSource(second, spool=spool).index().names) == 4
    assert len(list(tmp_path.glob("spool*"))) == 1


def test_unpacking_leaves_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_tar(tmp_path / "a.tar.xz", pictures(4))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**6))
    spool = tmp_path / "spool.tar"
    with pytest.raises(UserError, match=r"unpacks to more than .* has room for"):
        TarSource(path, spool=spool).index()
    assert list(tmp_path.glob("spool*")) == []
    monkeypatch.undo()
    assert len(TarSource(path, spool=spool).index().names) == 4
