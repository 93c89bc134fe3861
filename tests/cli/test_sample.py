"""``cmbench sample``: images without metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmbench.records.workspace import Workspace

Command = Callable[..., Any]


@pytest.fixture
def run(cmbench: Command, workspace: Workspace) -> str:
    """A conditional run on digits."""
    small = ("-o", "network.channels=8", "-o", "duration_kimg=0.512", "--samples", "16")
    done = cmbench("run", "-m", "ict", "-r", "smoke", "--nfe", "1", *small, "-q", "--no-report")
    assert done.code == 0, done.err
    (folder,) = (workspace.root / "runs" / "digits").iterdir()
    return f"digits/{folder.name}"


def test_folder_archive_and_grid_hold_the_same_images(
    cmbench: Command, run: str, tmp_path: Path
) -> None:
    out, packed, grid = tmp_path / "out", tmp_path / "s.npz", tmp_path / "new" / "g.png"
    done = cmbench("sample", run, "-n", "9", "--nfe", "2", "--out", str(out), "--grid", str(grid))
    assert done.code == 0, done.err
    assert done.out == f"NFE 2 (counted 2): 9 images of {run}, seed 0: {grid}, {out}\n"
    assert cmbench("sample", run, "-n", "9", "--nfe", "2", "--out", str(packed)).code == 0
    with np.load(packed) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype, labels.shape) == ((9, 8, 8, 1), np.uint8, (9,))
    files = sorted(out.iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(9)]
    for file, image in zip(files, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image[..., 0])
    drawn = np.asarray(Image.open(grid))
    assert drawn.shape == (16, 64)
    np.testing.assert_array_equal(drawn[:8, 8:16], images[1][..., 0])


def test_several_nfe_have_files_of_their_own(cmbench: Command, run: str, tmp_path: Path) -> None:
    done = cmbench("sample", run, "-n", "4", "--nfe", "1,2", "--out", str(tmp_path / "s.npz"))
    assert [line.split(" (")[0] for line in done.out.splitlines()] == ["NFE 1", "NFE 2"]
    assert {p.name for p in tmp_path.glob("*.npz")} == {"s-nfe1.npz", "s-nfe2.npz"}


def test_classes_are_repeated_in_turn(cmbench: Command, run: str, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    assert cmbench("sample", run, "-n", "5", "--labels", "1,7", "--out", str(path)).code == 0
    with np.load(path) as arrays:
        assert arrays["arr_1"].tolist() == [1, 7, 1, 7, 1]


def test_samples_are_those_of_the_scored_run(
    cmbench: Command, run: str, tmp_path: Path, workspace: Workspace
) -> None:
    path = tmp_path / "s.npz"
    assert cmbench("sample", run, "-n", "16", "--nfe", "1", "--out", str(path)).code == 0
    again = cmbench("run", "-m", "ict", "-r", "smoke", "--nfe", "1", "--save-samples", "-o",
                    "network.channels=8", "-o", "duration_kimg=0.512", "--samples", "16", "-q",
                    "--no-report", "-w", str(tmp_path / "other"))  # fmt: skip
    assert again.code == 0, again.err
    (folder,) = (tmp_path / "other" / "samples").iterdir()
    with np.load(path) as arrays:
        for index, image in enumerate(arrays["arr_0"]):
            saved = np.asarray(Image.open(folder / f"{index:06d}.png"))
            np.testing.assert_array_equal(saved, image[..., 0])


def test_images_of_two_samplings_never_mix(cmbench: Command, run: str, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "s.npz"
    for path in (out, packed):
        assert cmbench("sample", run, "-n", "5", "--out", str(path)).code == 0
        again = cmbench("sample", run, "-n", "3", "--seed", "1", "--out", str(path))
        assert (again.code, again.out) == (2, "")
        assert f"cmbench sample: {path} exists; allowed: a new path" in again.err
    (out / "notes.txt").write_text("mine")
    replaced = cmbench("sample", run, "-n", "3", "--out", str(out), "--force")
    assert replaced.code == 0, replaced.err
    assert sorted(p.name for p in out.iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "notes.txt",
    ]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "the images would go nowhere; allowed: --out FOLDER, --out FILE.npz or --grid"),
        (("--grid", "g.png", "-n", "0"), 2, "'--count' / '-n': 0 is not in the range 1<=x<="),
        (("--out", "x.npz", "-n", "9999999999"), 2, "'--count' / '-n': 9999999999 is not in the"),
        (("--grid", "g.txt"), 2, "--grid: 'g.txt'; allowed: FILE.png"),
        (("--out", "c.zip"), 2, "--out: 'c.zip'; allowed: a folder, or FILE.npz"),
        (("--grid", "g.png", "--threads", "100000"), 2, "'--threads': 100000 is not in the range"),
        (("--grid", "g.png", "--nfe", "0"), 2, "--nfe: '0'; allowed: whole numbers from 1"),
        (("--grid", "g.png", "--sigmas", "tuned"), 2, "--sigmas: 'tuned'; allowed: descending"),
        (("--grid", "g.png", "--labels", "a"), 2, "--labels: 'a'; allowed: classes"),
        (("--grid", "g.png", "--labels", "10"), 2, "labels from 10 to 10; allowed: 64 labels"),
        (("--grid", "g.png", "--sampler", "heun"), 2, "sampler 'heun'"),
        (("--grid", "g.png", "--ema", "x"), 2, "--ema: 'x' is not kept by this run"),
        (("--grid", "/proc/none/g.png"), 2, "cannot write /proc/none/g.png: No such file"),
        (("--out", "/proc/none"), 2, "/proc/none: cannot be written"),
    ],
)
def test_bad_requests_are_one_line(
    cmbench: Command, run: str, options: tuple[str, ...], code: int, message: str
) -> None:
    done = cmbench("sample", run, *options)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_run_that_is_not_there_is_exit_4(cmbench: Command) -> None:
    done = cmbench("sample", "digits/none", "--grid", "g.png")
    assert done.code == 4
    assert "run digits/none: is not in " in done.err
