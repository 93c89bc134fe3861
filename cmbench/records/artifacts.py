"""Artifacts: files beside a record (pictures, training curves), read with their hash checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
        data = path.read_bytes() if inside else b""
    except (OSError, ValueError, RuntimeError) as error:  # the latter: NULs, loops of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(f"{artifact.file!r} cannot be read: {reason}") from error
    if not inside:
        raise ArtifactError(f"{artifact.file} lies outside the record's folder")
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise ArtifactError(f"{artifact.file} is not the file that was measured: its hash differs")
    return data
