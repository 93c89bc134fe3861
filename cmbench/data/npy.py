"""Arrays from untrusted ``.npy`` and ``.npz`` files: never unpickled, never larger than the file.

numpy allocates what a header claims before it reads a byte, and unpacks every array of a ``.npz``.
Here a header must agree with the bytes that follow it, and only the arrays asked for are read.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cmbench.errors import UserError, one_line
from cmbench.files import regular
from cmbench.zips import UNREADABLE_ZIP, GuardedZip

Array = npt.NDArray[Any]
#: What the readers raise for files that are not arrays, or are damaged.
UNREADABLE = (
    *UNREADABLE_ZIP,
    LookupError,
    TypeError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
)


def npy_from_bytes(data: bytes) -> Array:
    """Return the array of a ``.npy``.

    Raises:
        ValueError: not a ``.npy``, an object array, or a header that claims more than there is.
    """
    _header(io.BytesIO(data), len(data))
    found: Array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return found


def npz_names(path: Path) -> tuple[str, ...]:
    """Return the names of the arrays in a ``.npz``; its arrays are not read.

    Raises:
        UserError: the ``.npz`` cannot be read.
    """
    try:
        with GuardedZip(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_npz(path: Path, names: Iterable[str], first: int | None = None) -> dict[str, Array]:
    """Return those arrays of an ``.npz`` that are among ``names``.

    Args:
        path: the file.
        names: of the arrays.
        first: read at most this many rows of each.

    Raises:
        UserError: the file is damaged, holds objects, or claims more than its size can hold.
    """
    wanted = set(names)
    try:
        with GuardedZip(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _member(archive, info, first)
                for info in archive.infolist()
                if info.filename.removesuffix(".npy") in wanted
            }
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def npz_rows(path: Path, name: str) -> int:
    """Return the number of rows of an array in an ``.npz``, from its header.

    Raises:
        UserError: the file is damaged, or has no such array.
    """
    try:
        with GuardedZip(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open_member(info) as file:
                return _header(file, info.file_size)[0][0]
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def map_npy(path: Path) -> Array:
    """Return the array of a ``.npy`` file as a memory map for reading.

    Raises:
        UserError: it is damaged, holds objects, or claims more than there is.
    """
    try:
        with regular(path).open("rb") as file:
            _header(file, path.stat().st_size)
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise _unreadable(path, error, "a whole .npy of a plain array") from error
    return array


def _member(archive: GuardedZip, info: zipfile.ZipInfo, first: int | None) -> Array:
    with archive.open_member(info) as file:
        shape, fortran, dtype = _header(file, info.file_size)
        if first is not None and not fortran and shape and shape[0] > first:
            shape = (first, *shape[1:])
            data = file.read(math.prod(shape) * dtype.itemsize)
            return np.frombuffer(data, dtype).reshape(shape)
    with archive.open_member(info) as file:
        found: Array = np.lib.format.read_array(file, allow_pickle=False)
    return found if first is None or not shape else found[:first]


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a ``.npy`` of ``size`` bytes: shape, whether columns come first, dtype."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format is for structured arrays")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("Object arrays are not read: they would be unpickled")
    if dtype.itemsize == 0 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"the header claims an array of {shape} {dtype} in {size:,} bytes")
    return shape, fortran, dtype


def _unreadable(
    path: Path, error: BaseException, allowed: str = "a whole .npz of plain arrays"
) -> UserError:
    reason = one_line(str(error), 200) or type(error).__name__
    return UserError(
        str(path), f"cannot be read: {reason}", allowed=allowed, remedy="download the file again"
    )
