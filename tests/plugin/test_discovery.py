"""Entry points are found without the standard library's slow reader, and as it finds them."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import EntryPoint as StandardEntryPoint
from importlib.metadata import EntryPoints
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmbench.plugin import discovery
from cmbench.plugin.discovery import EntryPoint, Source, group_entries, installed_sources

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
    sources = installed_sources()
    return [(s.distribution, s.version, s.entry_point.name, s.entry_point.value) for s in sources]


def test_the_installed_ones_are_those_of_the_standard_library() -> None:
    assert sorted(discovery._on_path()) == sorted(discovery._by_standard_library())


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
    assert sorted(discovery._on_path()) == sorted(discovery._by_standard_library())


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


def test_archives_on_the_path_are_left_to_the_standard_library(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = path / "zipped.egg"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped-1.0.dist-info/METADATA", METADATA.format(name="zipped", version="1"))
        file.writestr("zipped-1.0.dist-info/entry_points.txt", "[cmbench]\nx = y\n")
    monkeypatch.setattr(sys, "path", [str(archive)])
    assert found() == [("zipped", "1", "x", "y")]


def test_finders_of_their_own_are_left_to_the_standard_library(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find_distributions(self, *_: object) -> list[object]:
            return []

    asked: list[bool] = []
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    monkeypatch.setattr(discovery, "_by_standard_library", lambda: asked.append(True) or [])
    assert installed_sources() == []
    assert asked == [True]


LINES = st.lists(
    st.sampled_from(
        [
            "[cmbench]",
            "[ cmbench ]",
            "[other]",
            "a = x",
            "b=y:z",
            "  c  =  p.q:r [extra]  ",
            "# note = x",
            "",
            "   ",
            "; d = e",
        ]
    ),
    max_size=8,
)


@given(LINES)
def test_tables_are_read_as_the_standard_library_reads_them(lines: list[str]) -> None:
    text = "\n".join(["[first]", *lines])  # before a first section it reads nothing of sense
    standard = EntryPoints._from_text(text)
    assert group_entries(text) == [(p.name, p.value) for p in standard if p.group == "cmbench"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("json", lambda: __import__("json")),
        ("json:dumps", lambda: __import__("json").dumps),
        ("json.decoder:JSONDecoder.decode [x]", lambda: __import__("json").JSONDecoder.decode),
    ],
)
def test_entry_points_load_what_they_name(value: str, expected: Callable[[], object]) -> None:
    assert EntryPoint("n", value).load() is expected()
    assert StandardEntryPoint("n", value, "g").load() is expected()


def test_sources_can_be_compared() -> None:
    assert Source(EntryPoint("a", "b"), "d", "1") == Source(EntryPoint("a", "b"), "d", "1")
