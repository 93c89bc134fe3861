"""Entry points of the installed distributions: names, order, duplicates, damaged metadata."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cmbench.plugin.discovery import PluginInfo, installed_plugins

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: not this one\n"


def distribution(
    folder: Path, name: str, version: str, points: str, suffix: str = "dist-info"
) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.{suffix}"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text(points)
    header = "METADATA" if suffix == "dist-info" else "PKG-INFO"
    (info / header).write_text(METADATA.format(name=name, version=version))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is on ``sys.path``."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def found() -> list[tuple[str, str, str, str]]:
    return [(i.distribution, i.version, i.name, i.module) for i in installed_plugins()]


def test_groups_distributions_and_their_order(path: Path) -> None:
    distribution(path, "z-plugin", "2.0", "[cmbench]\nz = z\n[console_scripts]\nz = z:main\n")
    distribution(path, "a-plugin", "1.0", "[cmbench]\nb = a:b\na = a\n", "egg-info")
    distribution(path, "cmbench", "0.1.0", "[cmbench]\nbuiltins = cmbench_plugins\n")
    distribution(path, "other", "1.0", "[console_scripts]\ncmbench = other:main\n")
    (path / "broken-1.0.dist-info").mkdir()
    (path / "file.dist-info").write_text("not a folder")
    assert found() == [
        ("cmbench", "0.1.0", "builtins", "cmbench_plugins"),
        ("a-plugin", "1.0", "a", "a"),
        ("a-plugin", "1.0", "b", "a:b"),
        ("z-plugin", "2.0", "z", "z"),
    ]


def test_of_a_distribution_on_the_path_twice_the_first_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = path / "first", path / "second"
    distribution(first, "my-plugin", "2.0", "[cmbench]\nnew = p\n")
    distribution(second, "My_Plugin", "1.0", "[cmbench]\nold = p\n")
    monkeypatch.setattr(sys, "path", [str(first), str(second), str(first), str(path / "missing")])
    assert found() == [("my-plugin", "2.0", "new", "p")]


def test_a_distribution_without_metadata_is_named_by_its_folder(path: Path) -> None:
    info = path / "bare-3.1.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[cmbench]\nx = y\n")
    assert found() == [("bare", "3.1", "x", "y")]


def test_archives_on_the_path_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = path / "zipped.egg"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped-1.0.dist-info/METADATA", METADATA.format(name="zipped", version="1"))
        file.writestr("zipped-1.0.dist-info/entry_points.txt", "[cmbench]\nx = y\n")
    monkeypatch.setattr(sys, "path", [str(archive)])
    assert found() == [("zipped", "1", "x", "y")]


@pytest.mark.parametrize("points", [b"[cmbench]\n\xff = p\n", b"[cmbench]\nnothing\n", b"\x00"])
def test_damaged_entry_points_do_not_hide_other_distributions(path: Path, points: bytes) -> None:
    distribution(path, "a-damaged", "1.0", "")
    (path / "a_damaged-1.0.dist-info" / "entry_points.txt").write_bytes(points)
    distribution(path, "sound", "1.0", "[cmbench]\nx = y\n")
    assert found() == [("sound", "1.0", "x", "y")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("json", lambda: __import__("json")),
        ("json:dumps", lambda: __import__("json").dumps),
        ("json.decoder:JSONDecoder.decode [x]", lambda: __import__("json").JSONDecoder.decode),
    ],
)
def test_entry_points_load_what_they_name(value: str, expected: Callable[[], object]) -> None:
    assert PluginInfo("n", value, "d", "1").load() is expected()
