"""``benchmarks/cifar10_jpeg.py`` runs to its end on a few pictures."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cifar10_jpeg.py"
VARIABLE = "CMBENCH_CIFAR10_JPEG"
ARCHIVE = os.environ.get(VARIABLE, "")  # tests see no such variable later


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10_jpeg", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_few_pictures_takes_the_first_of_each_class_and_nothing_else(
    script: ModuleType, tmp_path: Path
) -> None:
    names = [f"{part}/{kind}/{n:04d}.jpg" for part in ("train", "test") for kind in ("cat", "dog")
             for n in range(5)]  # fmt: skip
    strange = ["../train/cat/0000.jpg", "/train/cat/0001.jpg", "train/cat/../0000.jpg", "notes.txt"]
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        for name in [*strange, *names]:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"jpg"))
    folder = script.few_pictures(tmp_path / "a.tar.xz", tmp_path / "few", 2)
    written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert written == sorted(n for n in names if n.endswith(("0000.jpg", "0001.jpg")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.xz", "few"]


def test_without_an_archive_it_says_what_to_give(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"no archive at None: give --archive or set {VARIABLE}"
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path(ARCHIVE or "/nowhere").exists(),
                    reason=f"needs the cifar10-jpeg archive: set {VARIABLE}")  # fmt: skip
def test_smoke_runs_to_the_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--archive", ARCHIVE, "--out", str(tmp_path / "o"),
         "--work", str(tmp_path / "w"), "--methods", "edm,sct", "--seconds", "280"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith("exit 0")
    with tarfile.open(tmp_path / "o" / "records.tar.gz") as packed:
        records = [n for n in packed.getnames() if n.endswith(".json")]
    assert len(records) >= 2
    assert (tmp_path / "o" / "cifar-cnn.safetensors").is_file()
