"""Sources that would be misread: hidden files, odd names, changed files, loops of links."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from command_outcome import Outcome
from dataset_builders import CLASSES, add_bytes, class_folder, edm_zip, image_tar, pictures

from cmbench.cli.common import command_line
from cmbench.cli.prepare import describe
from cmbench.data.locations import DataLocations
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.rules import Rule
from cmbench.data.sources import archives
from cmbench.data.sources.archives import TarSource, ZipSource
from cmbench.data.sources.base import EncodedSource, describe_passed_over
from cmbench.data.sources.batches import CifarPythonSource
from cmbench.data.sources.detect import open_source
from cmbench.data.sources.folder import FolderSource
from cmbench.errors import UserError
from cmbench.plugin.specs import DatasetSpec
from cmbench.samples.opening import open_samples

# ---- files that are passed over ----------------------------------------------------------------

#: Beside the images of ``source_of``: what is passed over, and why.
OTHERS = {
    "ant/more.PPM": ".ppm",
    "bee/more.jp2": ".jp2",
    "bee/more.ppm": ".ppm",
    "notes": "without a suffix",
    "ant/.cache.png": "hidden",
    ".ipynb_checkpoints/00000-checkpoint.png": "in hidden folders",
    "ant/.thumbs/deep/00000.png": "in hidden folders",
    "__MACOSX/ant/._00000.png": "in hidden folders",
}
COUNTS = {".ppm": 2, ".jp2": 1, "without a suffix": 1, "hidden": 1, "in hidden folders": 3}
LINE = "8 files passed over: 3 in hidden folders, 2 .ppm, 1 .jp2, 1 hidden, 1 without a suffix"


def source_of(kind: str, folder: Path, names: Iterable[str]) -> Path:
    """A source of that kind: class folders of six images, and files of these names."""
    root = folder / "source"
    class_folder(root, pictures(6))
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    if kind == "folder":
        return root
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = folder / f"source.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, str(file.relative_to(root)))
    else:
        with tarfile.open(path, "w") as tar:
            for file in files:
                tar.add(file, f"./{file.relative_to(root)}")
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_that_are_passed_over_are_counted_by_reason(tmp_path: Path, kind: str) -> None:
    source = open_source(source_of(kind, tmp_path, OTHERS))
    assert isinstance(source, EncodedSource)
    index = source.index()
    assert index.class_names == list(CLASSES)
    assert index.labels == [0, 0, 1, 1, 2, 2]
    assert index.passed_over == COUNTS
    assert describe_passed_over(index.passed_over) == LINE


def test_nothing_is_said_where_nothing_is_passed_over(tmp_path: Path) -> None:
    assert FolderSource(source_of("folder", tmp_path, ())).index().passed_over == {}
    (tmp_path / "source/dataset.json").write_text('{"labels": null}')
    assert FolderSource(tmp_path / "source").index().passed_over == {}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_prepare_and_eval_report_what_was_passed_over(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, kind: str
) -> None:
    path = source_of(kind, tmp_path, OTHERS)
    assert LINE in open_samples(str(path)).notes
    manifest, _ = prepare(spec, rule, Request(path), locations)
    assert manifest.source.passed_over == COUNTS
    assert f"note: {LINE}" in describe(manifest, locations, done=True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_of_one_name_are_counted(
    tmp_path: Path, cmbench: Callable[..., Outcome], kind: str
) -> None:
    class_folder(tmp_path / "source", pictures(6))
    images = [path.read_bytes() for path in sorted((tmp_path / "source").rglob("*.png"))]
    names = [*(f"{i}.png" for i in range(5)), "x.png", "x.png", "x.png"]
    files = list(zip(names, [*images, images[0], images[1]], strict=True))
    archive = tmp_path / f"twice.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for name, data in files:
                packed.writestr(name, data)
    else:
        with tarfile.open(archive, "w") as tar:
            for name, data in files:
                add_bytes(tar, name, data)
    source = open_source(archive)
    assert isinstance(source, EncodedSource)
    index = source.index()
    assert list(index.names) == [*(f"{i}.png" for i in range(5)), "x.png"]
    assert source.reader().read(index.locators[5]) == images[1]
    assert index.passed_over == {"with the name of a later one": 2}
    if kind == "tar":  # only known datasets are prepared from one
        return
    done = cmbench("prepare", f"zip:{archive}", "--name", "a", "--data-dir", str(tmp_path))
    assert "note: 2 files passed over: 2 with the name of a later one" in done.out.splitlines()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_images_beside_class_folders_are_said(
    tmp_path: Path, cmbench: Callable[..., Outcome], kind: str
) -> None:
    root = tmp_path / "source"
    class_folder(root, pictures(6))
    shutil.copy(next(root.rglob("*.png")), root / "loose.png")
    path = source_of(kind, tmp_path, ())
    source = open_source(path)
    assert isinstance(source, EncodedSource)
    index = source.index()
    note = "1 of 7 images lie outside the folders ant, bee, cat: labels are not read from folders"
    assert (index.labels, list(index.notes)) == (None, [note])
    if kind != "tar":
        assert open_samples(str(path)).notes == [note]
        done = cmbench("prepare", f"{kind}:{path}", "--name", "a", "--data-dir", str(tmp_path))
        assert f"note: {note}" in done.err
    (root / "loose.png").unlink()
    assert list(FolderSource(root).index().notes) == []


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_source_without_an_image_says_what_it_holds(tmp_path: Path, kind: str) -> None:
    path = source_of(kind, tmp_path, ())
    (tmp_path / "other").mkdir()
    for image in (tmp_path / "source").rglob("*.png"):
        image.rename(image.with_suffix(".ppm"))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.ppm", b"")
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            add_bytes(tar, "a.ppm", b"")
    source = open_source(path)
    assert isinstance(source, EncodedSource)
    with pytest.raises(UserError, match=r"holds no images \(\d files? passed over: \d .ppm"):
        source.index()


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_that_are_not_utf_8(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, kind: str
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    path = source_of(kind, tmp_path / odd, ())
    for folder in (tmp_path / odd / "source").iterdir():
        if folder.name == "ant":
            (folder / "00000.png").rename(folder / f"{odd}.png")
            folder.rename(folder.with_name(odd))
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / odd / "source", ".")
    path = path.rename(path.with_name(f"{odd}.{kind}"))
    manifest, _ = prepare(spec, rule, Request(path), locations)
    assert manifest.class_names == ["bee", "caf\\xe9", "cat"]
    assert manifest.source.name == f"caf\\xe9.{kind}"
    assert prepare(spec, rule, Request(path), locations) == (manifest, False)
    if kind == "folder":
        source = open_samples(str(path))
        assert sum(len(batch.images) for batch in source.batches(4)) == 6
        assert source.name.encode().endswith(b"caf\\xe9.folder")
        (path / odd / f"{odd}.png").write_bytes(b"no image")
        with pytest.raises(
            UserError, match=r"image 'caf.*xe9/caf.*xe9.png' cannot be decoded"
        ) as e:
            list(open_samples(str(path)).batches(4))
        str(e.value).encode()


def test_a_command_with_a_name_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records keep the command, and every character of a record can be written."""
    monkeypatch.setattr("sys.argv", ["cmbench", "eval", os.fsdecode(b"caf\xe9"), "--nfe", "1"])
    assert command_line() == "cmbench eval 'caf\\xe9' --nfe 1"


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
