"""Find the entry points of group ``cmbench`` among the installed distributions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import PurePath

ENTRY_POINT_GROUP = "cmbench"


@dataclass
class PluginInfo:
    """One entry point (``name = module``) and what became of it."""

    name: str
    module: str
    distribution: str
    version: str
    status: str = "ok"
    error: str = ""
    warning: str = ""
    hooks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution} {self.version})"

    def load(self) -> object:
        """Import and return the object that the entry point names, or the module without one."""
        return EntryPoint(self.name, self.module, ENTRY_POINT_GROUP).load()


def installed_plugins() -> list[PluginInfo]:
    """Return every entry point of group ``cmbench`` with its distribution, built-ins first.

    If a distribution is on the path twice, only the first counts, as for imports. Distributions
    whose metadata are damaged do not hide the others.
    """
    seen: set[str] = set()
    found: list[PluginInfo] = []
    for distribution in distributions():
        points = _group(distribution)
        name, version = _name_and_version(distribution) if points else ("", "")
        normalized = name.lower().replace("-", "_").replace(".", "_")
        if points and normalized not in seen:
            seen.add(normalized)
            found += [PluginInfo(point.name, point.value, name, version) for point in points]
    return sorted(found, key=lambda i: (i.distribution != "cmbench", i.distribution, i.name))


def _group(distribution: Distribution) -> list[EntryPoint]:
    try:
        return [p for p in distribution.entry_points if p.group == ENTRY_POINT_GROUP]
    except (ValueError, TypeError, OSError):  # not UTF-8, a line without "=", a file in its way
        return []


def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    """Return what the metadata say, or what the name of their folder says without them."""
    stem = PurePath(str(getattr(distribution, "_path", "unknown"))).stem
    name, _, version = stem.partition("-")
    known = set(distribution.metadata)  # asking for a missing key is deprecated
    return (
        distribution.name if "Name" in known else name,
        distribution.version if "Version" in known else version,
    )
