"""Checkpoints: safetensors plus JSON, atomic, hashed, the last good one kept.

The tensors are written to a temporary name, flushed and renamed; then a JSON manifest with their
SHA-256 follows the same way. The manifest is the commit point: a checkpoint without a manifest, or
whose tensors do not match it, does not exist for a reader. The manifest is sealed: its metadata
cannot change unnoticed either. Older ones are removed only after that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmbench.errors import UserError
from cmbench.files import FormatError, read_sealed, reading, sha256_file, write_sealed

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and the manifest's metadata."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    sha256: str


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Write ``path`` (``.safetensors``) and its manifest (``.json``); return the tensors' hash.

    Raises:
        UserError: when the disk is full or the folder cannot be written; older files stay.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(unshared(tensors), temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            sha256 = sha256_file(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write checkpoint {path}",
            str(getattr(error, "strerror", None) or error),
            remedy="free space or choose a writable folder with --workspace, then start again: "
            "training resumes from the last good checkpoint",
        ) from error
    write_sealed(path.with_suffix(".json"), {"format": FORMAT, "sha256": sha256, "meta": meta})
    return sha256


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors with memory of their own (safetensors refuses views).

    An average's buffers are the network's, and tied weights are one tensor under two names.
    """
    ready: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != value.nbytes:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        ready[name] = value
    return ready


_REMEDY = "restore the file, or delete it to fall back to an older one or train again"


def load_checkpoint(path: Path, remedy: str = _REMEDY) -> Checkpoint:
    """Read and verify a checkpoint; raise ``UserError`` naming the file if anything is wrong."""
    who = f"checkpoint {path}"
    meta, expected = read_manifest(path, remedy)
    with reading(who, remedy):
        actual = sha256_file(path)
    if actual != expected:
        raise UserError(
            who,
            f"is corrupt: its SHA-256 is {actual[:12]}…, the manifest says {str(expected)[:12]}…",
            remedy=remedy,
        )
    try:
        return Checkpoint(path, load_file(path), meta, expected)
    except (SafetensorError, OSError) as error:
        raise UserError(who, f"is not a safetensors file ({error})", remedy=remedy) from error


def read_manifest(path: Path, remedy: str = _REMEDY) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's metadata and the hash of its tensors, which are not read.

    Raises:
        UserError: the manifest cannot be read, or is of another format.
    """
    who = f"checkpoint {path}"
    with reading(f"{who}, manifest", remedy):
        manifest = read_sealed(path.with_suffix(".json"))
        expected, meta, version = manifest["sha256"], dict(manifest["meta"]), manifest["format"]
        if not isinstance(expected, str):
            raise FormatError(f"has a {type(expected).__name__} as the hash of its tensors")
    if version != FORMAT:
        raise UserError(who, f"has format {version!r}", allowed=str(FORMAT), remedy=remedy)
    return meta, expected


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest good checkpoint in ``folder`` and a warning for every bad one passed over.

    Raises:
        UserError: if there are checkpoints and none of them is good.
    """
    warnings: list[str] = []
    for manifest in sorted(folder.glob("*.json"), reverse=True):
        try:
            return load_checkpoint(manifest.with_suffix(".safetensors")), warnings
        except UserError as error:
            warnings.append(str(error))
    if warnings:
        raise UserError(
            f"run folder {folder.parent}",
            f"has no good checkpoint: {warnings[0]}",
            remedy=f"restore it, or delete {folder} to train from the start",
        )
    return None, warnings


def prune_checkpoints(folder: Path, keep: int = 2) -> None:
    """Remove all but the newest ``keep`` checkpoints, manifests first, and stale leftovers."""
    for manifest in sorted(folder.glob("*.json"), reverse=True)[keep:]:
        manifest.unlink(missing_ok=True)
    named = {m.stem for m in folder.glob("*.json")}
    for orphan in folder.glob("*.safetensors"):
        if orphan.stem not in named:
            orphan.unlink(missing_ok=True)
    for stale in folder.glob(".*.tmp"):
        stale.unlink(missing_ok=True)
