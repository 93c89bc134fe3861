"""The references on this machine: list, show, import, compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmbench.errors import UserError
from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import load_reference, save_reference
from cmbench.metrics.reference_import import import_reference


@dataclass(frozen=True)
class Entry:
    """A file in the store: a reference, or why it cannot be read."""

    path: Path
    reference: Reference | None
    problem: str = ""

    @property
    def name(self) -> str:
        """File name without its suffix, which names the reference in commands."""
        return self.path.stem


@dataclass(frozen=True)
class Comparison:
    """How far two references are from each other.

    ``frechet`` is their distance; ``mean_part`` the share of it that the means make; ``relative``
    the distance over the trace of the first covariance.
    """

    frechet: float
    mean_part: float
    relative: float


class ReferenceStore:
    """Reference files: imported ones in ``folder``, computed ones in ``caches`` beside it."""

    def __init__(self, folder: Path, *caches: Path) -> None:
        self.folder, self.caches = folder, caches

    def paths(self) -> list[Path]:
        """Return all files in name order."""
        folders = (self.folder, *self.caches)
        found = [path for folder in folders for path in folder.glob("*.safetensors")]
        return sorted(found, key=lambda path: path.name)

    def entries(self) -> Iterator[Entry]:
        """Yield every file in name order; a damaged one with its problem."""
        for path in self.paths():
            try:
                yield Entry(path, load_reference(path))
            except UserError as error:
                yield Entry(path, None, str(error))

    def get(self, name: str) -> Reference:
        """Return the reference whose file name begins with ``name``, or that of a file.

        A file of another program is read as it would be imported.

        Raises:
            UserError: none or several do; the message lists them.
        """
        if Path(name).is_file():
            return import_reference(Path(name))
        paths = self.paths()
        exact = [path for path in paths if path.stem == name]
        matches = exact or [path for path in paths if path.stem.startswith(name)]
        if len(matches) != 1:
            known = ", ".join(path.stem for path in matches or paths) or "none yet"
            problem = "is ambiguous" if matches else "does not exist"
            raise UserError(
                f"reference {name!r}", problem, allowed=known, remedy="see `cmbench refs list`"
            )
        return load_reference(matches[0])

    def add(self, reference: Reference) -> Path:
        """Keep a reference and return its path."""
        path = self.folder / reference.key.file_name
        save_reference(reference, path)
        return path


def compare_references(first: Reference, second: Reference) -> Comparison:
    """Return the distance between two references of one extractor.

    Raises:
        UserError: they were made with different extractors or preprocessing.
    """
    for what in ("extractor", "preprocessing"):
        a, b = getattr(first.key, what), getattr(second.key, what)
        if a != b:
            raise UserError(
                "cmbench refs compare",
                f"{what} {a!r} against {b!r}",
                allowed="two references of one extractor and preprocessing",
            )
    distance = frechet_distance(first.moments, second.moments)
    shift = float((first.moments.mean - second.moments.mean).square().sum())
    return Comparison(
        frechet=distance,
        mean_part=shift / distance if distance > 0 else math.nan,
        relative=distance / float(first.moments.cov.trace()),
    )
