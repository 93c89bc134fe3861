"""Tensors in pickles, and the files of ``torch.save``, read without torch's own unpickler.

torch writes a zip with the pickle and one file for each storage, or, in its older format, a series
of pickles followed by the storages. Its restricted unpickler bounds neither time nor memory.
"""

from __future__ import annotations

import io
import math
import pickle  # for its error
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cmbench.data.pickle_names import PLAIN_NAMES, Function, RefusedName, Sealed
from cmbench.data.pickles import RestrictedUnpickler, unpickling, unshell
from cmbench.errors import first_names
from cmbench.files import regular
from cmbench.zips import GuardedZip


class _Word(metaclass=Sealed):
    """Stands for a name without consequence: a dtype, a device, a class beside a tensor."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


class StorageWord:
    """Stands for a class of storages; ``dtype`` is what they hold."""

    __slots__ = ("dtype",)
    dtype: torch.dtype

    def __init__(self, dtype: torch.dtype) -> None:
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse."""
        raise RefusedName(f"a change of a storage's {name}")


def _whole_numbers(*values: object) -> bool:
    """Return whether all are whole numbers from 0: tensors and booleans count otherwise."""
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


#: Elements that a tensor may have although its storage has fewer, being expanded from it.
_EXPANDED = 1 << 16


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
    """Rebuild a tensor and check that it lies within its storage."""
    if not isinstance(storage, Tensor):
        raise RefusedName("a tensor without a storage")
    if not isinstance(size, (tuple, list)) or not isinstance(stride, (tuple, list)):
        raise ValueError("a tensor without a size or a stride")
    if len(size) != len(stride) or len(size) > 64 or not _whole_numbers(offset, *size, *stride):
        raise ValueError("a tensor of an impossible size, stride or offset")
    assert isinstance(offset, int)
    last, count = offset + sum((n - 1) * s for n, s in zip(size, stride)), math.prod(size)
    if count and (last >= storage.numel() or count > max(storage.numel(), _EXPANDED)):
        raise ValueError(f"a tensor of size {size} that ends at {last} of {storage.numel()}")
    laid = torch.as_strided(storage, tuple(size), tuple(stride), offset)
    return laid if count == storage.numel() and laid.is_contiguous() else laid.clone()


def _parameter(data: object, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise RefusedName("a parameter without a tensor")
    return data


_TENSOR, _PARAMETER = Function(_tensor), Function(_parameter)


def _from_type(rebuild: object, _type: object, arguments: tuple[Any, ...], *_: object) -> Tensor:
    """Rebuild a tensor that carried attributes; only our own stand-ins can be named."""
    if rebuild is not _TENSOR and rebuild is not _PARAMETER:
        raise RefusedName("a tensor of unknown make")
    result: Tensor = (_TENSOR if rebuild is _TENSOR else _PARAMETER)(*arguments)
    return result


_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8")
#: What pickles of tensors name beside plain data.
TENSOR_NAMES: Mapping[str, Any] = {
    **PLAIN_NAMES,
    "torch._utils._rebuild_tensor": _TENSOR,
    "torch._utils._rebuild_tensor_v2": _TENSOR,
    "torch._utils._rebuild_parameter": _PARAMETER,
    "torch._utils._rebuild_parameter_with_state": _PARAMETER,
    "torch._tensor._rebuild_from_type_v2": Function(_from_type),
    "torch.device": _Word,
    "torch.Size": tuple,
    "torch.Tensor": _Word,
    "torch.nn.parameter.Parameter": _Word,
    **{f"torch.{name}": _Word for name in (*_DTYPES, "bool")},
    **{
        f"torch{cuda}.{kind}Storage": StorageWord(dtype)
        for cuda in ("", ".cuda")
        for kind, dtype in _STORAGES.items()
    },
    "torch.storage.UntypedStorage": StorageWord(torch.uint8),
}


class TensorUnpickler(RestrictedUnpickler):
    """Builds tensors, over storages that ``storage`` returns, and plain data.

    Args:
        file, names, size: as :class:`RestrictedUnpickler` has them.
        storage: returns the flat tensor of a dtype, a key in the file and a number of elements.
    """

    def __init__(
        self,
        file: BinaryIO,
        names: Mapping[str, Any] = TENSOR_NAMES,
        size: int | None = None,
        storage: Callable[[torch.dtype, str, int], Tensor] | None = None,
    ) -> None:
        super().__init__(file, names, size)
        self._last: Tensor | None = None
        self._storage = storage

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that ``("storage", class, key, device, count, …)`` means."""
        if self._storage is None or not isinstance(pid, tuple) or len(pid) < 5:
            return super().persistent_load(pid)
        kind, word, key, _, count, *view = pid
        key = key.decode("latin1") if isinstance(key, bytes) else key  # Python 2
        sound = isinstance(word, StorageWord) and isinstance(key, str) and _whole_numbers(count)
        if kind not in ("storage", b"storage") or not sound or view not in ([], [None]):
            raise pickle.UnpicklingError("a storage of unknown make")
        return self._storage(word.dtype, key, count)

    def call(self, load: Callable[[Any], None], count: int) -> None:
        """Count the bytes of tensors too: each is a copy of its part of a storage.

        A tensor is never the object of a call. Its own ``__setstate__`` would let a pickle lay it
        anew over any size of memory, which nobody has written to, or over another tensor.
        """
        if count and isinstance(self.stack[-count - 1], Tensor):
            raise RefusedName("a change of a tensor")
        super().call(load, count)
        made = self.stack[-1]
        if isinstance(made, Tensor) and made is not self._last:  # as a parameter of it would be
            self._last = made
            self.spend(made.numel() * made.element_size())


# ---- files of torch.save -----------------------------------------------------------------------


def read_torch(path: Path, who: str) -> Any:
    """Return what a file of ``torch.save`` holds: tensors, arrays and plain data.

    Raises:
        UserError: it is damaged or names anything else. Nothing of the file is executed.
    """
    with unpickling(who), regular(path).open("rb") as file:
        if file.read(2) == b"PK":
            return unshell(_read_zip(path))
        file.seek(0)
        return unshell(_read_series(file))


def storage_from_bytes(data: object) -> Tensor:
    """Return a storage that is pickled as bytes, in torch's older format, as a flat tensor."""
    if not isinstance(data, bytes):
        raise RefusedName("a storage that is not bytes")
    if data[:2] == b"PK":  # torch pickles storages in its older format, which cannot be packed
        raise RefusedName("a storage in a zip")
    found = _read_series(io.BytesIO(data))
    if not isinstance(found, Tensor) or found.dim() != 1:
        raise RefusedName("a tensor in the place of a storage")
    return found


def _read_zip(path: Path) -> Any:
    with GuardedZip(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        top = archive.namelist()[0].partition("/")[0]
        left, storages = archive.size, dict[str, Tensor]()

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            nonlocal left
            if key not in storages:
                info = members[f"{top}/data/{key}"]
                left -= info.file_size
                if left < 0 or info.file_size != count * dtype.itemsize:
                    raise ValueError(f"storage {key[:20]!r} of {info.file_size:,} bytes")
                storages[key] = _filled(archive, info, dtype, count)
            if (storages[key].dtype, storages[key].numel()) != (dtype, count):
                raise ValueError(f"storage {key[:20]!r} is of two kinds")
            return storages[key]

        order = members.get(f"{top}/byteorder")
        if order is not None and archive.read_member(order, 16) != b"little":
            raise ValueError("not little-endian")
        info = members.get(f"{top}/data.pkl")
        if info is None:
            raise ValueError(
                f"an archive of {first_names(list(members), 3)}, not a checkpoint of torch"
            )
        with archive.open_member(info, stored=True) as file:
            data = io.BytesIO(file.read())
        return TensorUnpickler(data, size=archive.size, storage=storage).load()


def _filled(archive: GuardedZip, info: zipfile.ZipInfo, dtype: torch.dtype, count: int) -> Tensor:
    flat = torch.empty(count, dtype=dtype)
    with archive.open_member(info, stored=True) as file:
        _fill(flat, file)
    return flat


def _fill(flat: Tensor, file: Any) -> None:
    """Read a flat tensor's bytes; raise ``EOFError`` if there are too few."""
    raw: Any = flat.view(torch.uint8).numpy()
    view = memoryview(raw)
    while len(view):
        read = file.readinto(view[: 1 << 24])
        if not read:
            raise EOFError("a storage is cut off")
        view = view[read:]


#: What the older format begins with: its magic number and its version, each a pickle.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def _read_series(file: BinaryIO) -> Any:
    """Read torch's older format: the object is unpickled twice.

    The storages follow the object, which makes tensors of them. The first time it makes tensors
    without memory, and says which storages there are.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if (RestrictedUnpickler(file).load(), RestrictedUnpickler(file).load()) != (_MAGIC, _VERSION):
        raise ValueError("not a file of torch.save")
    RestrictedUnpickler(file).load()  # sizes of C's types
    start, left = file.tell(), size
    storages: dict[str, Tensor] = {}

    def declared(dtype: torch.dtype, key: str, count: int) -> Tensor:
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:
                raise EOFError("its storages are cut off")
            storages[key] = torch.empty(count, dtype=dtype, device="meta")
        return storages[key]

    TensorUnpickler(file, size=size, storage=declared).load()
    listed = RestrictedUnpickler(file).load()
    keys = [key.decode("latin1") if isinstance(key, bytes) else key for key in listed]
    if sorted(keys) != sorted(storages):
        raise ValueError("storages that do not belong to its tensors")
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        if count != storages[key].numel():
            raise ValueError(f"a storage of {count} elements, not {storages[key].numel()}")
        storages[key] = torch.empty_like(storages[key], device="cpu")
        _fill(storages[key], file)
    file.seek(start)

    def real(dtype: torch.dtype, key: str, count: int) -> Tensor:
        return storages[key]

    return TensorUnpickler(file, size=size, storage=real).load()
