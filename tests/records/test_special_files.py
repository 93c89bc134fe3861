"""Named pipes and devices in the place of files: refused in one line, never waited for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_outcome import Outcome
from PIL import Image

from cmbench.files import read_json, read_toml, regular, sha256_file


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """End a test that waits for a pipe, which would last forever."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    names = ("pictures/y.png", "f.npz", "f.npy", "f.pkl", "f.pt", "f.safetensors", "f.zip", "f.tar")
    for name in (*names, "f.toml", "f.json", "workspace/records/digits/f.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "eval f.npz -d digits",
        "eval f.npy -d digits",
        "eval f.zip -d digits",
        "import f.pkl --to x",
        "import f.pt --to x",
        "import f.safetensors --to x",
        "prepare zip:f.zip",
        "prepare cifar10 --source f.tar",
        "run -r f.toml:x",
        "status",
        "report",
    ],
)
def test_a_pipe_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cmbench: Callable[..., Outcome], command: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CMBENCH_WORKSPACE", str(folder / "workspace"))
    monkeypatch.setenv("CMBENCH_DATA", str(folder / "data"))
    found = cmbench(*command.split())
    assert found.code in (1, 2)
    assert "not a regular file" in found.out + found.err


def test_pipes_among_pictures_are_counted(folder: Path) -> None:
    from cmbench.samples.opening import open_samples

    source = open_samples(str(folder / "pictures"))
    assert source.count == 2
    assert source.notes == ["1 file passed over: 1 not regular"]


def test_readers_refuse_pipes_and_devices(folder: Path) -> None:
    for reader in (regular, read_json, read_toml, sha256_file):
        for path in (folder / "f.json", Path("/dev/zero")):
            with pytest.raises(OSError, match="not a regular file"):
                reader(path)
    (folder / "link").symlink_to("pictures/0.png")
    assert regular(folder / "link") == folder / "link"
