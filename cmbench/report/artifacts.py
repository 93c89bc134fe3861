"""Files beside the records: pictures for the page, checked before they are embedded."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmbench.bench.record import Artifact, Record

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
#: Pictures of one page together; beyond it the page names the files instead of showing them.
PAGE_BUDGET_BYTES = 1_500_000
#: Points of one embedded curve; longer ones are thinned evenly.
CURVE_POINTS = 200


@dataclass(frozen=True)
class Picture:
    """A sample grid as a data URI, with what it shows."""

    row: str
    title: str
    name: str
    uri: str


@dataclass(frozen=True)
class Curve:
    """Training curves of one run: images seen and one list per scalar."""

    row: str
    title: str
    run: str
    nimg: Sequence[float]
    scalars: Mapping[str, Sequence[float | None]]


class ArtifactError(Exception):
    """An artifact that cannot be shown, and why."""


def read_artifact(record_path: Path, artifact: Artifact) -> bytes:
    """Return an artifact's bytes; refuse files outside the record's folder or with another hash."""
    folder = record_path.parent.resolve()
    path = (folder / artifact.file).resolve()
    if not path.is_relative_to(folder):
        raise ArtifactError(f"{artifact.file} lies outside the record's folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{artifact.file} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise ArtifactError(f"{artifact.file} is not the file that was measured: its hash differs")
    return data


def png_uri(data: bytes, file: str) -> str:
    """Return PNG bytes as a data URI; anything else is refused, whatever its name says."""
    if not data.startswith(PNG_MAGIC):
        raise ArtifactError(f"{file} is not a PNG")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def parse_curves(data: bytes, file: str) -> tuple[list[float], dict[str, list[float | None]]]:
    """Return ``(nimg, scalars)`` of a curves file, thinned to :data:`CURVE_POINTS`.

    The file is JSON: ``{"nimg": [...], "scalars": {"loss": [...], ...}}``, lists of equal length,
    null where a value was not finite.
    """
    try:
        content = json.loads(data)
        nimg, scalars = content["nimg"], content["scalars"]
        length = len(nimg)
        if any(len(values) != length for values in scalars.values()):
            raise ValueError("lists of unequal length")
        stride = max(1, math.ceil(length / CURVE_POINTS))
        return (
            [float(n) for n in nimg[::stride]],
            {str(k): [_finite(v) for v in values[::stride]] for k, values in scalars.items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} holds no training curves: {error!r}") from error


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def is_picture(artifact: Artifact) -> bool:
    """Whether an artifact is meant to be looked at."""
    return artifact.file.lower().endswith(".png")


def is_curves(name: str, artifact: Artifact) -> bool:
    """Whether an artifact holds training curves."""
    return name == "curves" and artifact.file.lower().endswith(".json")


def first_with(
    cells: Sequence[tuple[Path, Record]], wanted: str
) -> tuple[Path, Record] | None:  # fmt: skip
    """Return the first cell that has the artifact ``wanted``."""
    return next(((p, r) for p, r in cells if wanted in r.artifacts), None)
