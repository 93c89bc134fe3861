from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_builders import (
    CLASSES,
    cifar_archive,
    class_folder,
    edm_zip,
    encode,
    image_tar,
    pictures,
)
from filelock import FileLock
from PIL import Image

from cmbench.data.catalog import BUILTIN_DATASETS
from cmbench.data.locations import DataLocations
from cmbench.data.preparation import partial
from cmbench.data.preparation.run import Request, is_large, prepare
from cmbench.data.rules import RULES, Rule
from cmbench.data.store import open_store
from cmbench.data.verify import verify
from cmbench.errors import BusyError, UserError
from cmbench.plugin.specs import DatasetSpec

SPECS = {spec.name: spec for spec in BUILTIN_DATASETS}
LABELS = [2, 0, 1, 1, 0, 2]


def left_behind(locations: DataLocations) -> list[str]:
    """What lies in the data folder besides locks."""
    return sorted(p.name for p in locations.data_dir.glob("*") if p.suffix != ".lock")


# ---- what comes out ----------------------------------------------------------------------------


def test_a_folder_becomes_a_dataset(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    images = pictures(30)
    class_folder(tmp_path / "source", images)
    stages: list[tuple[str, int, int]] = []
    manifest, done = prepare(
        spec, rule, Request(tmp_path / "source"), locations, lambda *s: stages.append(s)
    )
    assert done
    store = open_store(locations.folder("tiny"))
    order = sorted(range(30), key=lambda i: (i % 3, i))
    assert np.array_equal(store.images, images[order].transpose(0, 3, 1, 2))
    assert store.labels is not None
    assert store.labels.tolist() == [i % 3 for i in order]
    assert manifest.class_names == list(CLASSES)
    assert manifest.class_counts == [10, 10, 10]
    assert (manifest.revision, manifest.lossy, manifest.converted) == ("as-is", False, {})
    assert left_behind(locations) == ["tiny"]
    assert stages[-1] == ("verifying", 30, 30)
    assert verify(locations.folder("tiny")) == manifest


def test_the_content_decides_the_hash_not_the_source(
    tmp_path: Path, spec: DatasetSpec, rule: Rule
) -> None:
    # The same pictures and labels from an EDM zip, a tar and CIFAR's batches.
    images, labels = pictures(15, 32), sorted(i % 3 for i in range(15))
    big = spec._replace(data_shape=(3, 32, 32))
    ordered = images[sorted(range(15), key=lambda i: (i % 3, i))]
    sources = [
        edm_zip(tmp_path / "a.zip", ordered, labels),
        edm_zip(tmp_path / "b.zip", ordered, labels, compression=zipfile.ZIP_DEFLATED),
        image_tar(tmp_path / "c.tar.xz", images),
        cifar_archive(tmp_path / "cifar-10-python.tar.gz", ordered, labels),
    ]
    hashes = set()
    for i, source in enumerate(sources):
        locations = DataLocations(tmp_path / f"data{i}")
        hashes.add(prepare(big, rule, Request(source), locations)[0].sha256)
        assert left_behind(locations) == ["tiny"]
    assert len(hashes) == 1


def test_workers_make_what_one_process_makes(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmbench.data.preparation.run._SERIAL_IMAGES", 0)
    path = edm_zip(tmp_path / "a.zip", pictures(2500), [i % 3 for i in range(2500)])
    made = [
        prepare(spec, rule, Request(path, workers=n), DataLocations(tmp_path / f"{n}"))[0]
        for n in (1, 2)
    ]
    assert made[0].sha256 == made[1].sha256
    broken = bytearray(path.read_bytes())
    broken[broken.rfind(b"IDAT") + 30] ^= 255
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"img00002499.png' is damaged"):
        prepare(spec, rule, Request(path, workers=2), DataLocations(tmp_path / "3"))


def test_a_glance_tells_whether_workers_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmbench.data.preparation.run._SERIAL_IMAGES", 6)
    monkeypatch.setattr("cmbench.data.preparation.run._LARGE_SOURCE", 100)
    class_folder(tmp_path / "source", pictures(5))
    assert not is_large(tmp_path / "source")
    (tmp_path / "source/ant/more.png").write_bytes(b"0" * 99)
    assert is_large(tmp_path / "source")
    assert not is_large(tmp_path / "source/ant/more.png")
    (tmp_path / "source/ant/more.png").write_bytes(b"0" * 100)
    assert is_large(tmp_path / "source/ant/more.png")


def test_pixel_modes_are_converted_and_counted(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    class_folder(tmp_path, pictures(3))
    grey = pictures(1, channels=1)[0]
    (tmp_path / "ant/zz.png").write_bytes(encode(grey))
    Image.fromarray(pictures(1)[0]).convert("CMYK").save(tmp_path / "bee/zz.jpg")
    manifest, _ = prepare(spec, rule, Request(tmp_path), locations)
    assert manifest.converted == {
        "are grey (made RGB by repeating the channel)": 1,
        "have pixel mode CMYK (converted to RGB)": 1,
    }
    assert manifest.lossy
    assert np.array_equal(open_store(locations.folder("tiny")).images[1], [grey[..., 0]] * 3)


def test_pictures_are_placed_in_order_however_many_make_a_group(
    tmp_path: Path, rule: Rule, locations: DataLocations
) -> None:
    # Seven grey pictures of 20x20, more than one group, the last one short.
    images = pictures(7, 20, channels=1)
    spec = DatasetSpec("grey", "", "grey", (1, 20, 20), 0, "pixels", (), (1,), 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmbench.data.preparation.decode._GROUP_BYTES", 3 * 400)
        path = edm_zip(tmp_path / "a.zip", images, None)
        prepare(spec, rule, Request(path), locations)
    found = open_store(locations.folder("grey")).images
    assert np.array_equal(found, images.transpose(0, 3, 1, 2))


def test_pictures_cannot_have_four_channels(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(3), [0, 1, 2])
    message = r"image '00000/img00000000.png' cannot have 4 channels; allowed: 1 or 3"
    wide = spec._replace(data_shape=(4, 8, 8))
    check_refused(wide, rule, Request(path), locations, message)


def test_imagenet_crops_are_applied_to_originals_and_recorded(
    tmp_path: Path, rule: Rule, spec: DatasetSpec
) -> None:
    source = tmp_path / "train"
    for name in CLASSES:
        (source / name).mkdir(parents=True)
        Image.fromarray(pictures(1, 30)[0]).crop((0, 0, 30, 22)).save(source / name / "x.png")
    hashes = set()
    for transform in ("adm-crop", "edm-crop", "lsun-crop"):
        cut = dataclasses.replace(rule, transform=transform)
        manifest, _ = prepare(spec, cut, Request(source), DataLocations(tmp_path / transform))
        assert manifest.revision == transform
        hashes.add(manifest.sha256)
    assert len(hashes) == 3


def test_latents(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(3, 8, 64, 64)).astype(np.float32)
    folder = tmp_path / "source"
    folder.mkdir()
    for i, latent in enumerate(latents):
        np.save(folder / f"img{i:08d}.npy", latent)
    names = [[f"img{i:08d}.npy", 7 * i] for i in range(3)]
    (folder / "dataset.json").write_text(json.dumps({"labels": names}))
    locations = DataLocations(tmp_path / "data")
    request = Request(folder, subset=True)
    spec, rule = SPECS["imagenet512"], RULES["imagenet512"]
    manifest, _ = prepare(spec, rule, request, locations)
    assert manifest.dtype == "float32"
    assert manifest.revision == "as-is+subset-3"
    assert np.array_equal(open_store(locations.folder("imagenet512")).images, latents)
    np.save(folder / "img00000001.npy", latents[1].astype(np.float64))
    with pytest.raises(UserError, match=r"00001.npy' holds float64 .*allowed: float32 \(8, 64, 64"):
        prepare(spec, rule, dataclasses.replace(request, force=True), locations)
    np.save(folder / "img00000001.npy", np.where(latents[1] > 2, np.float32("nan"), latents[1]))
    with pytest.raises(UserError, match=r"00001.npy' holds NaN or infinite values; allowed: fin"):
        prepare(spec, rule, dataclasses.replace(request, force=True), locations)
    np.save(folder / "img00000001.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"00001.npy' cannot be read"):
        prepare(spec, rule, dataclasses.replace(request, force=True), locations)
    lie = b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000,), }".ljust(117)
    (folder / "img00000001.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + lie + b"\n")
    with pytest.raises(UserError, match=r"00001.npy' cannot be read .*claims an array of"):
        prepare(spec, rule, dataclasses.replace(request, force=True), locations)
    assert left_behind(locations) == ["imagenet512"]


# ---- bad input ---------------------------------------------------------------------------------


def check_refused(
    spec: DatasetSpec, rule: Rule, request: Request, locations: DataLocations, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare(spec, rule, request, locations)
    assert "\n" not in str(caught.value)
    assert left_behind(locations) == []  # nothing half-written


def test_a_zip_without_labels_for_a_dataset_with_classes(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), None)
    message = r"has no labels, but 'tiny' has 3 classes; .*the class folders, or .*zip:PATH"
    check_refused(spec, rule, Request(path), locations, message)
    manifest, _ = prepare(spec._replace(num_classes=0), rule, Request(path), locations)
    assert (manifest.num_classes, manifest.class_counts) == (0, [])


@pytest.mark.parametrize("label", [3, -1, 10**9])
def test_a_label_out_of_range(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, label: int
) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), [0, 1, label, 2, 0, 1])
    message = rf"label {label} of image '00000/img00000002.png' is out of range; allowed: 0 … 2"
    check_refused(spec, rule, Request(path), locations, message)


def test_the_wrong_number_of_class_folders(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    class_folder(tmp_path / "source", pictures(8), ("a", "b", "c", "d"))
    message = r"has 4 class folders \(a, b, c, …\); allowed: 3"
    check_refused(spec, rule, Request(tmp_path / "source"), locations, message)


def test_the_wrong_resolution(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6, 16), LABELS)
    message = r"image '00000/img00000000.png' is 16x16; allowed: 8x8"
    check_refused(spec, rule, Request(path), locations, message)
    cut = dataclasses.replace(rule, transform="adm-crop")  # which is for originals, not for a zip
    check_refused(spec, cut, Request(path), locations, message)


@pytest.mark.parametrize("data", [b"", b"hello", "cut"])
def test_an_image_that_is_none(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, data: bytes | str
) -> None:
    class_folder(tmp_path / "source", pictures(6))
    bad = tmp_path / "source/bee/00001.png"
    bad.write_bytes(bad.read_bytes()[:80] if isinstance(data, str) else data)
    message = r"image 'bee/00001.png' cannot be decoded \(\w+.*replace the file"
    check_refused(spec, rule, Request(tmp_path / "source"), locations, message)


def test_the_wrong_number_of_images(tmp_path: Path, locations: DataLocations) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(10, 32), list(range(10)))
    spec, rule = SPECS["cifar10"], RULES["cifar10"]
    message = r"holds 10 images; allowed: 50,000; .*add --subset"
    check_refused(spec, rule, Request(path), locations, message)
    manifest, _ = prepare(spec, rule, Request(path, subset=True), locations)
    assert manifest.subset
    assert manifest.revision == "as-is+subset-10"
    small = dataclasses.replace(rule, count=9)
    with pytest.raises(UserError, match=r"holds 10 images; allowed: 9; give --source"):
        prepare(spec, small, Request(path, subset=True, force=True), locations)


def test_lossy_pictures_are_never_cifar10(tmp_path: Path, locations: DataLocations) -> None:
    for i, image in enumerate(pictures(10, 32)):
        folder = tmp_path / "source" / str(i)
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(encode(image, "jpeg"))
    message = r"image '0/0.jpg' is JPEG, which is lossy; .*prepare cifar10-jpeg"
    request = Request(tmp_path / "source", subset=True)
    check_refused(SPECS["cifar10"], RULES["cifar10"], request, locations, message)
    assert prepare(SPECS["cifar10-jpeg"], RULES["cifar10-jpeg"], request, locations)[0].lossy


def test_a_source_of_another_kind(tmp_path: Path, locations: DataLocations) -> None:
    path = cifar_archive(tmp_path / "cifar-10-python.tar.gz", pictures(10, 32), [0] * 10)
    message = r"cannot be the source of 'imagenet64'; allowed: folder, zip, tar; give --source the"
    check_refused(SPECS["imagenet64"], RULES["imagenet64"], Request(path), locations, message)


def test_batches_of_another_resolution(
    tmp_path: Path, locations: DataLocations, rule: Rule
) -> None:
    path = cifar_archive(tmp_path / "cifar-10-python.tar.gz", pictures(10, 32), [0] * 10)
    message = r"holds images of shape \(3, 32, 32\); allowed: \(3, 64, 64\)"
    check_refused(SPECS["imagenet64"], rule, Request(path), locations, message)


def test_bad_batches_leave_nothing_behind(
    tmp_path: Path, locations: DataLocations, rule: Rule
) -> None:
    # More than a block is copied before the fault shows, which is in the last batch.
    images, spec = pictures(5500, 32), SPECS["cifar10"]
    path = cifar_archive(tmp_path / "a.tar.gz", images, [*[0] * 5499, 10])
    message = r"data_batch_5 holds label 10 \(of its image 1099\); allowed: 0 … 9"
    check_refused(spec, rule, Request(path), locations, message)
    path = cifar_archive(tmp_path / "b.tar.gz", images, [0] * 5500)
    counted = dataclasses.replace(rule, count=6000)
    check_refused(spec, counted, Request(path), locations, r"holds 5,500 images; allowed: 6,000")


def test_missing_batches_are_named(tmp_path: Path, locations: DataLocations) -> None:
    for i in (1, 3, 4, 5, 6, 8, 9, 10):
        np.savez(
            tmp_path / f"train_data_batch_{i}.npz",
            data=np.zeros((2, 12288), np.uint8),
            labels=[1, 1000],
        )
    spec, rule = SPECS["imagenet64-small"], RULES["imagenet64-small"]
    message = r"lacks train_data_batch_2, train_data_batch_7; .*; download .*--subset"
    check_refused(spec, rule, Request(tmp_path), locations, message)
    assert prepare(spec, rule, Request(tmp_path, subset=True), locations)[0].count == 16


def test_altered_batches_are_recorded(tmp_path: Path, locations: DataLocations) -> None:
    path = cifar_archive(tmp_path / "cifar-10-python.tar.gz", pictures(10, 32), [0] * 10)
    rule = dataclasses.replace(RULES["cifar10"], count=10)
    assert prepare(SPECS["cifar10"], rule, Request(path), locations)[0].revision == "as-is+altered"


def test_a_full_disk_is_found_out_first(
    tmp_path: Path,
    spec: DatasetSpec,
    rule: Rule,
    locations: DataLocations,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), LABELS)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: usage)
    check_refused(spec, rule, Request(path), locations, r"GiB are needed in .*free some space")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device", "images.npy")

    monkeypatch.undo()
    monkeypatch.setattr("cmbench.data.preparation.decode.os.pwrite", no_space)
    check_refused(spec, rule, Request(path), locations, r"No space left on device: images.npy; .*")


def test_a_data_folder_that_cannot_be_made(tmp_path: Path, spec: DatasetSpec, rule: Rule) -> None:
    (tmp_path / "file").write_text("in the way")
    path = edm_zip(tmp_path / "a.zip", pictures(6), LABELS)
    with pytest.raises(UserError, match=r"cmbench prepare: .*set CMBENCH_DATA"):
        prepare(spec, rule, Request(path), DataLocations(tmp_path / "file"))


def test_a_second_process_is_told_to_wait(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), LABELS)
    locations.data_dir.mkdir()
    with (
        FileLock(locations.data_dir / "tiny.lock"),
        pytest.raises(BusyError, match=r"another process prepares 'tiny'; wait"),
    ):
        prepare(spec, rule, Request(path), locations)


# ---- again, otherwise, after a kill ------------------------------------------------------------


def test_preparing_again_does_nothing(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(6), LABELS)
    first, _ = prepare(spec, rule, Request(path), locations)
    assert prepare(spec, rule, Request(path), locations) == (first, False)
    other = edm_zip(tmp_path / "b.zip", pictures(6, seed=1), LABELS)
    with pytest.raises(
        UserError, match=r"was prepared from a.zip, with other files or settings; add --force"
    ):
        prepare(spec, rule, Request(other), locations)
    assert verify(locations.folder("tiny")) == first
    replaced, done = prepare(spec, rule, Request(other, force=True), locations)
    assert done
    assert replaced.sha256 != first.sha256
    assert left_behind(locations) == ["tiny"]


class Stop(Exception):
    """Stops a preparation in the middle."""


def interrupt_at(count: int, stage: str = "decoding") -> object:
    def progress(name: str, done: int, total: int) -> None:
        if name == stage and done >= count:
            raise Stop

    return progress


@pytest.fixture
def zip_of_2500(tmp_path: Path) -> Path:
    return edm_zip(tmp_path / "a.zip", pictures(2500), [i % 3 for i in range(2500)])


def test_an_interrupted_preparation_resumes(
    zip_of_2500: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, tmp_path: Path
) -> None:
    request = Request(zip_of_2500)
    whole, _ = prepare(spec, rule, request, DataLocations(tmp_path / "whole"))
    with pytest.raises(Stop):
        prepare(spec, rule, request, locations, interrupt_at(1024))  # type: ignore[arg-type]
    assert left_behind(locations) == ["tiny.partial"]
    decoded: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "decoding":
            decoded.append(done)

    resumed, _ = prepare(spec, rule, request, locations, note)
    assert decoded[0] == 1024  # the first block was not made again
    assert resumed.sha256 == whole.sha256
    assert left_behind(locations) == ["tiny"]


def test_a_changed_source_does_not_resume(
    zip_of_2500: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        prepare(spec, rule, Request(zip_of_2500), locations, interrupt_at(1024))  # type: ignore[arg-type]
    other = edm_zip(tmp_path / "b.zip", pictures(2500, seed=1), [0, 1] * 1250)
    with pytest.raises(
        UserError, match=r"started with other settings \(contents differ\); .*--restart"
    ):
        prepare(spec, rule, Request(other), locations)
    fresh, _ = prepare(spec, rule, Request(other), DataLocations(tmp_path / "fresh"))
    manifest, _ = prepare(spec, rule, Request(other, restart=True), locations)
    assert manifest.sha256 == fresh.sha256


def test_a_block_that_was_damaged_meanwhile_is_made_again(
    zip_of_2500: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations, tmp_path: Path
) -> None:
    request = Request(zip_of_2500)
    whole, _ = prepare(spec, rule, request, DataLocations(tmp_path / "whole"))
    with pytest.raises(Stop):
        prepare(spec, rule, request, locations, interrupt_at(1024))  # type: ignore[arg-type]
    images = locations.data_dir / "tiny.partial/images.npy"
    with open(images, "r+b") as file:
        file.seek(500)
        file.write(b"\0\0\0\0\1\2\3\4")
    with pytest.raises(UserError, match=r"1 of 3 blocks .* read back differently; run the same"):
        prepare(spec, rule, request, locations)
    assert prepare(spec, rule, request, locations)[0].sha256 == whole.sha256


def test_an_interrupted_copy_of_batches_resumes(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, locations: DataLocations
) -> None:
    images, labels = pictures(2600, 32), [i % 3 for i in range(2600)]
    path = cifar_archive(tmp_path / "cifar-10-python.tar.gz", images, labels)
    big = spec._replace(data_shape=(3, 32, 32))
    with pytest.raises(Stop):
        prepare(big, rule, Request(path), locations, interrupt_at(1024, "copying"))  # type: ignore[arg-type]
    assert left_behind(locations) == ["tiny.partial"]
    prepare(big, rule, Request(path), locations)
    store = open_store(locations.folder("tiny"))
    assert np.array_equal(store.images, images.transpose(0, 3, 1, 2))
    assert store.labels is not None
    assert store.labels.tolist() == labels


SCRIPT = """
import sys
from pathlib import Path
from cmbench.data.locations import DataLocations
from cmbench.data.preparation.run import Request, is_large, prepare
from cmbench.data.rules import Rule
from cmbench.plugin.specs import DatasetSpec
import cmbench.data.preparation.run as run
if __name__ == "__main__":
    run._SERIAL_IMAGES = 0
    spec = DatasetSpec("tiny", "", "tiny", (3, 8, 8), 3, "pixels", (), (1,), 10)
    rule = Rule("the tiny pictures")
    request = Request(Path(sys.argv[1]), workers=int(sys.argv[3]))
    print("ready", flush=True)
    prepare(spec, rule, request, DataLocations(Path(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, workers: str
) -> None:
    count = 8_000
    path = edm_zip(tmp_path / "a.zip", pictures(count), [i % 3 for i in range(count)])
    whole, _ = prepare(spec, rule, Request(path), DataLocations(tmp_path / "whole"))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(path), str(tmp_path / "data")]
    dice = random.Random(int(workers))
    for _ in range(3):
        child = subprocess.Popen([*command, workers], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(dice.uniform(0.05, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    subprocess.run([*command, workers], check=True, stdout=subprocess.DEVNULL)
    found = verify(tmp_path / "data/tiny")
    assert found.sha256 == whole.sha256
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["tiny", "tiny.lock"]


@pytest.mark.slow
def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(20_000), [i % 3 for i in range(20_000)])
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(path), str(tmp_path / "data"), "2"]
    child = subprocess.Popen(command)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while not workers and child.poll() is None and time.monotonic() < deadline:
        pids = [int(p) for p in children.read_text().split()]
        workers = [p for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        time.sleep(0.01)
    assert workers, "no worker was started"
    child.kill()
    child.wait()
    while any(_alive(p) for p in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(p) for p in workers)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


# ---- the real thing ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_cifar10_jpeg(cifar10_jpeg: Path, locations: DataLocations) -> None:
    """10,000 real pictures (the test part: a fifth of the time of all)."""
    spec, rule = SPECS["cifar10-jpeg"], RULES["cifar10-jpeg"]
    manifest, _ = prepare(spec, rule, Request(cifar10_jpeg, "test", subset=True), locations)
    assert manifest.shape == (10_000, 3, 32, 32)
    assert manifest.class_counts == [1000] * 10
    assert manifest.class_names[0] == "airplane"
    assert manifest.lossy
    assert manifest.revision == "as-is+test+subset-10000"
    # CIFAR-10's own means and standard deviations, which mild JPEG leaves as they are.
    images = open_store(locations.folder("cifar10-jpeg")).images / 255
    assert images.mean((0, 2, 3)) == pytest.approx([0.4942, 0.4851, 0.4504], abs=0.002)
    assert images.std((0, 2, 3)) == pytest.approx([0.2467, 0.2429, 0.2616], abs=0.004)
