"""Arrays from untrusted ``.npy`` and ``.npz`` files: never unpickled, never larger than the file.

numpy allocates what a header claims before it reads a byte, and unpacks every array of a ``.npz``.
Here a header must agree with the bytes that follow it, and only the arrays asked for are read.
"""

from __future__ import annotations

import io
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cmbench.errors import UserError

Array = npt.NDArray[Any]
#: Deflate cannot pack better than 1032 to 1.
_DEFLATE = 1040
#: What the readers raise for files that are not arrays, or are damaged.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    MemoryError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def npy_from_bytes(data: bytes) -> Array:
    """Return the array of a ``.npy``.

    Raises:
        ValueError: not a ``.npy``, an object array, or a header that claims more than there is.
    """
    return _read_array(io.BytesIO(data), io.BytesIO(data), len(data))


def npz_names(path: Path) -> tuple[str, ...]:
    """Return the names of the arrays in a ``.npz``; its arrays are not read.

    Raises:
        UserError: the ``.npz`` cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_npz(path: Path, names: Iterable[str]) -> dict[str, Array]:
    """Return those arrays of an ``.npz`` that are among ``names``.

    Raises:
        UserError: the file is damaged, holds objects, or claims more than its size can hold.
    """
    wanted = set(names)
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _member(archive, info, path.stat().st_size)
                for info in archive.infolist()
                if info.filename.removesuffix(".npy") in wanted
            }
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> Array:
    packed = info.compress_type != zipfile.ZIP_STORED
    if info.file_size > min(info.compress_size, size) * (_DEFLATE if packed else 1):
        raise ValueError(f"{info.filename} claims {info.file_size:,} bytes")
    with archive.open(info) as head, archive.open(info) as whole:
        return _read_array(head, whole, info.file_size)


def _read_array(head: IO[bytes], whole: IO[bytes], size: int) -> Array:
    """Read ``whole``; ``head`` is a second handle on the same ``size`` bytes, for the header."""
    version = np.lib.format.read_magic(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format is for structured arrays")
    shape, _, dtype = readers[version](head)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"the header claims an array of {shape} in {size:,} bytes")
    found: Array = np.lib.format.read_array(whole, allow_pickle=False)
    return found


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        str(path),
        f"cannot be read: {reason}",
        allowed="a whole .npz of plain arrays",
        remedy="fetch the file again",
    )
