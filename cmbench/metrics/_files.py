"""Hashed safetensors files for the metric layer."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from cmbench.errors import UserError
from cmbench.files import regular, write_atomically
from cmbench.importers.tensors import read_torch


def sha256_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, whatever the file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name}:{tensor.dtype}:{tuple(tensor.shape)};"
        digest.update(head.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_state(path: Path, who: str, allowed: str, remedy: str, key: str) -> dict[str, Tensor]:
    """Return a published state dict that has ``key``; nothing but tensors is unpickled.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        state = read_torch(path, who)
    except (OSError, UserError) as error:
        problem = error.problem if isinstance(error, UserError) else error.strerror
        what = f"cannot be read: {problem}"
        raise UserError(who, what, allowed=allowed, remedy=remedy) from error
    if not isinstance(state, dict) or key not in state:
        raise UserError(who, "holds something else", allowed=allowed, remedy=remedy)
    return state


@contextmanager
def written_anew(state: dict[str, Tensor]) -> Iterator[Path]:
    """Give a file of ``torch.save`` with ``state`` for libraries that unpickle their weights.

    They must not see the file that was checked: another reader may find another archive in it.
    """
    with tempfile.TemporaryDirectory(prefix="cmbench-weights-") as folder:
        path = Path(folder) / "weights.pth"
        torch.save(state, path)
        yield path


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save_tensors(contiguous, metadata=metadata))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file written by :func:`write_tensors`.

    The tensors are copies in memory of torch's own alignment: last bits of matrix products depend
    on where a tensor begins, and a file holds tensors at any byte.

    Raises:
        UserError: the file is missing, truncated, or not of the ``kind`` in its metadata.
    """
    remedy = "delete the file and run again to compute it again"
    try:
        with safe_open(regular(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(str(path), "does not exist", allowed=f"a {kind} file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            str(path),
            f"cannot be read: {error}",
            allowed=f"a whole safetensors {kind} file",
            remedy=remedy,
        ) from error
    if metadata.get("kind") != kind:
        found = metadata.get("kind", "no kind")
        raise UserError(str(path), f"holds {found!r}", allowed=f"kind {kind!r}", remedy=remedy)
    return tensors, metadata
