"""Find the entry points of group ``cmbench`` among the installed distributions, cheaply.

``importlib.metadata`` alone takes longer to import than a listing should run (it brings the email
and socket packages along), and parses what is not needed. So the ``entry_points.txt`` of every
distribution on ``sys.path`` is read directly; only if something unusual can hold distributions (a
zip archive on the path, a finder of its own) is the standard library asked. A test holds both to
the same answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cmbench.plugin.specs import load_object

ENTRY_POINT_GROUP = "cmbench"
_SUFFIXES = (".dist-info", ".egg-info")


@dataclass(frozen=True)
class EntryPoint:
    """``name = package.module:object`` (the object is optional)."""

    name: str
    value: str

    def load(self) -> object:
        """Import and return the object, or the module where none is named."""
        path = self.value.partition("[")[0].strip()
        return load_object(path) if ":" in path else import_module(path)


@dataclass(frozen=True)
class Source:
    """An entry point with the distribution it comes from."""

    entry_point: EntryPoint
    distribution: str
    version: str


def installed_sources() -> list[Source]:
    """Return every entry point of group ``cmbench`` with its distribution, built-ins first.

    Of a distribution that is on the path twice only the first counts, as for imports.
    """
    search = _on_path if _path_is_plain() else _by_standard_library
    seen: set[str] = set()
    found: list[Source] = []
    for name, version, points in search():
        normalized = name.lower().replace("-", "_").replace(".", "_")
        if normalized not in seen:
            seen.add(normalized)
            found += [Source(EntryPoint(*pair), name, version) for pair in points]
    return sorted(
        found, key=lambda s: (s.distribution != "cmbench", s.distribution, s.entry_point.name)
    )


#: Name and version of a distribution, and its entry points of the group as (name, value).
Found = tuple[str, str, list[tuple[str, str]]]


def _path_is_plain() -> bool:
    """Say whether all distributions lie in folders of ``sys.path``."""
    finders: list[Any] = [f for f in sys.meta_path if hasattr(f, "find_distributions")]
    standard = all(getattr(f, "__name__", "") == "PathFinder" for f in finders)
    return standard and not any(os.path.isfile(entry) for entry in sys.path)


def _on_path() -> Iterator[Found]:
    for entry in dict.fromkeys(sys.path):
        try:
            names = sorted(n for n in os.listdir(entry or ".") if n.endswith(_SUFFIXES))
        except OSError:
            continue
        for name in names:
            folder = os.path.join(entry or ".", name)
            points = group_entries(_read(os.path.join(folder, "entry_points.txt")))
            if points:
                yield *_name_and_version(folder), points


def _by_standard_library() -> Iterator[Found]:
    from importlib.metadata import distributions  # slow to import, rarely needed

    for distribution in distributions():
        points = [
            (point.name, point.value)
            for point in distribution.entry_points
            if point.group == ENTRY_POINT_GROUP
        ]
        if points:
            yield distribution.name, distribution.version, points


def group_entries(text: str, group: str = ENTRY_POINT_GROUP) -> list[tuple[str, str]]:
    """Return the ``(name, value)`` pairs of one group of an ``entry_points.txt``."""
    pairs, current = [], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            current = line[1:-1]
        elif current == group and line and not line.startswith("#"):
            name, _, value = line.partition("=")
            pairs.append((name.strip(), value.strip()))
    return pairs


def _name_and_version(folder: str) -> tuple[str, str]:
    """Return what the header of ``METADATA`` (or ``PKG-INFO``) says."""
    text = _read(os.path.join(folder, "METADATA")) or _read(os.path.join(folder, "PKG-INFO"))
    header = dict(
        line.partition(":")[::2] for line in text.partition("\n\n")[0].splitlines() if ":" in line
    )
    stem = os.path.basename(folder).rpartition(".")[0]
    name, _, version = stem.partition("-")
    return header.get("Name", name).strip(), header.get("Version", version).strip()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
