"""Artifacts: files beside a record (pictures, training curves), read with their hash checked."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from pathlib import Path

from cmbench.files import regular
from cmbench.records.record import Artifact


class ArtifactError(Exception):
    """An artifact that cannot be used, and why."""


def read_artifact(record_path: Path, artifact: Artifact) -> bytes:
    """Return an artifact's bytes.

    Raises:
        ArtifactError: the file cannot be read, lies outside the record's folder (after following
            links) or has another hash than the record says.
    """
    try:
        folder = record_path.parent.resolve()
        path = (folder / artifact.file).resolve()
        inside = path.is_relative_to(folder)
        data = regular(path).read_bytes() if inside else b""
    except (OSError, ValueError, RuntimeError) as error:  # the latter: NULs, loops of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(f"{artifact.file!r} cannot be read: {reason}") from error
    if not inside:
        raise ArtifactError(f"{artifact.file} lies outside the record's folder")
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise ArtifactError(f"{artifact.file} is not the file that was measured: its hash differs")
    return data


def parse_curve(data: bytes) -> tuple[list[float], dict[str, list[float | None]]]:
    """Return ``(nimg, scalars)`` of a training curve.

    The file is CSV with a column ``nimg`` (images seen). Every other column that holds a number is
    a scalar; empty cells and values that are not finite become None.

    Raises:
        ValueError: the bytes are not such a file.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(data.decode()), strict=True))
        nimg = [float(line["nimg"]) for line in lines]
        if not all(math.isfinite(x) for x in nimg):
            raise ValueError("nimg is not finite")
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"holds no training curve: {error!r}") from error
    names = [name for name in (lines[0] if lines else {}) if name and name != "nimg"]
    scalars = {name: [_number(line[name]) for line in lines] for name in names}
    return nimg, {name: v for name, v in scalars.items() if any(x is not None for x in v)}


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
