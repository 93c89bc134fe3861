"""Reading pickles without running them: primitives, containers and plain numpy arrays only.

The unpickler never looks a name up by import. A pickle that names anything outside a table of inert
stand-ins is refused, by that name. Imports no torch.
"""

from __future__ import annotations

import io
import os
import pickle  # only its opcode machine, with find_class closed
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, ClassVar

import numpy as np

from cmbench.data.pickle_names import PLAIN_NAMES, ArrayShell, RefusedName, key_size
from cmbench.errors import UserError, one_line
from cmbench.files import corrupt
from cmbench.zips import UNREADABLE_ZIP

#: What a broken or hostile pickle makes the opcode machine raise.
BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    ImportError,
    RecursionError,
    AssertionError,
    struct.error,
)


class _Bounded:
    """A file whose reads make no room for more than it has left, as Python's own do."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        """Read ``count`` bytes, or raise ``EOFError``."""
        if count > self._size:
            raise EOFError(f"{count} bytes of {self._size}")
        return self._file.read(count)


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that takes names from a table only, within budgets.

    It is pickle's own in Python, not the one in C: there the memo is an array as long as the
    largest index in it, so that five bytes of a file take gigabytes. What a pickle may make from
    what it already holds is bounded by a small multiple of its size; opcodes, the sizes of keys and
    of integers, and processor time are bounded too.

    Args:
        file: where the pickle begins; read up to its end.
        names: what it may name, and the stand-in of each.
        size: bytes of the whole file, if the pickle is a part of it.
    """

    # The machine's own parts, which type stubs leave out.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    #: Bytes that calls may be given or make, per byte of the pickle. An ordinary pickle needs
    #: three: a storage's bytes, the storage, and the tensor in it.
    SHARE = 6
    #: Opcodes. A million class numbers need about as many.
    MOST_OPCODES = 5_000_000
    #: Processor time. A network of gigabytes takes a few seconds.
    MOST_SECONDS = 60.0
    #: What an element of a container counts.
    _ELEMENT = 8
    #: Bytes of an integer; those of text are limited by Python.
    _LARGEST_INTEGER = 256

    def __init__(
        self, file: BinaryIO, names: Mapping[str, Any] = PLAIN_NAMES, size: int | None = None
    ) -> None:
        here = file.tell()
        self._size = file.seek(0, os.SEEK_END) - here
        file.seek(here)
        # Python 2 strings become bytes: the array data in them survives, text is decoded later.
        super().__init__(_Bounded(file, self._size), encoding="bytes")
        self.names = names
        self._left = self.SHARE * (size or self._size) + 2**20
        self._opcodes, self._began = 0, time.thread_time()

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module.name``; refuse every other name."""
        try:
            return self.names[f"{module}.{name}"]
        except KeyError:
            raise RefusedName(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to outside objects."""
        shown = repr(pid[:60]) if isinstance(pid, str) else f"of a {type(pid).__name__}"
        raise RefusedName(f"a persistent object {shown}")

    def spend(self, amount: int) -> None:
        """Count bytes that are about to be copied; refuse when they become too many."""
        self._left -= amount
        if self._left < 0:
            raise RefusedName(f"more than {self.SHARE} times its own size in memory")

    def _spend_on(self, *values: object) -> None:
        for value in values:
            if isinstance(value, (str, bytes, bytearray)):
                self.spend(len(value))
            elif isinstance(value, (tuple, list, dict, set, frozenset)):
                self.spend(self._ELEMENT * len(value))

    # The machine calls these by opcode, with itself as their argument.

    def step(self) -> None:
        """Count an opcode; refuse when they become too many or take too long."""
        self._opcodes += 1
        if self._opcodes > self.MOST_OPCODES:
            raise RefusedName(f"more than {self.MOST_OPCODES:,} steps")
        if not self._opcodes % 1024 and time.thread_time() - self._began > self.MOST_SECONDS:
            raise RefusedName(f"more than {self.MOST_SECONDS:g} s of processor time")

    def call(self, load: Callable[[Any], None], count: int) -> None:
        """Do an opcode that calls something with the last ``count`` values of the stack."""
        for given in self.stack[-count:]:
            self._spend_on(given, *(given if isinstance(given, tuple) else ()))
        load(self)

    def hash_keys(self, keys: Iterable[Any]) -> None:
        """Count keys that are about to be hashed."""
        for key in keys:
            self.spend(self._ELEMENT * (key_size(key) - 1))

    def _bytearray(self) -> None:
        """Read a length and as many bytes; pickle's own makes room for them before it looks."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    def _long4(self) -> None:
        """Read an integer of any length; what prints it later would take a time quadratic in it."""
        (length,) = struct.unpack("<i", self.read(4))
        if not 0 <= length <= self._LARGEST_INTEGER:
            raise pickle.UnpicklingError(f"an integer of {length} bytes")
        self.append(pickle.decode_long(self.read(length)))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)


def _counted(load: Callable[[Any], None], count: int) -> Callable[[Any], None]:
    return lambda machine: machine.call(load, count)


def _hashing(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def hashing(machine: RestrictedUnpickler) -> None:
        machine.hash_keys(machine.stack[keys])
        load(machine)

    return hashing


def _stepping(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def stepping(machine: RestrictedUnpickler) -> None:
        machine.step()
        load(machine)

    return stepping


#: How many values each calling opcode takes: 0 is all since the last mark.
_CALLS = {
    pickle.REDUCE: 1,
    pickle.NEWOBJ: 1,
    pickle.NEWOBJ_EX: 2,
    pickle.BUILD: 1,
    pickle.OBJ: 0,
    pickle.INST: 0,
}
#: Where each opcode that hashes finds what it hashes, on the stack since the last mark.
_KEYS = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(0, None, 2),
    pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}
_dispatch = RestrictedUnpickler.dispatch
_dispatch[pickle.BYTEARRAY8[0]] = RestrictedUnpickler._bytearray
_dispatch[pickle.LONG4[0]] = RestrictedUnpickler._long4
for _code, _count in _CALLS.items():
    _dispatch[_code[0]] = _counted(_dispatch[_code[0]], _count)
for _code, _keys in _KEYS.items():
    _dispatch[_code[0]] = _hashing(_dispatch[_code[0]], _keys)
for _opcode, _load in _dispatch.items():
    _dispatch[_opcode] = _stepping(_load)


def unshell(value: Any) -> Any:
    """Return ``value`` with array shells replaced by arrays, in dicts, lists and tuples.

    What the pickle shares stays shared, so that the result is no larger than what was read.
    """
    return _unshell(value, {})


def _unshell(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, ArrayShell):
        return value.array
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) in done:
        return done[id(value)]
    result: Any
    if isinstance(value, dict):
        result = done[id(value)] = {}
        for k, v in value.items():
            name = k.decode("utf-8", "replace") if isinstance(k, bytes) else k
            result[name] = _unshell(v, done)
    elif isinstance(value, tuple):
        result = done[id(value)] = tuple(_unshell(v, done) for v in value)
    elif any(isinstance(v, (ArrayShell, dict, list)) for v in value):
        result = done[id(value)] = []
        result.extend(_unshell(v, done) for v in value)
    else:
        result = value
    return result


def as_array(value: object, what: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array, or a flat list of numbers as one; ``what`` names it in the error.

    Lists that hold one another would become arrays of any size.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, np.ndarray):
        return value
    flat = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
    if not flat:
        raise ValueError(f"{what} is a {type(value).__name__}, not an array or a list of numbers")
    return np.asarray(value)


def load_plain_pickle(file: BinaryIO | bytes, who: str) -> Any:
    """Read a pickle of plain data and arrays; ``who`` names the file in messages.

    Raises ``UserError`` if it is truncated or corrupt, or names anything that plain data does
    not need. Nothing of the file is executed.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    with unpickling(who):
        return unshell(RestrictedUnpickler(stream).load())


@contextmanager
def unpickling(who: str) -> Iterator[None]:
    """Turn what a pickle raises in the block into ``UserError``; ``who`` names the file."""
    try:
        yield
    except RefusedName as refused:
        raise refused_error(who, refused) from None
    except (*BROKEN, *UNREADABLE_ZIP) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened
        raise corrupt(who, "pickle", error) from None


def refused_error(who: str, refused: RefusedName) -> UserError:
    """Return the error for a pickle with a refused name."""
    return UserError(
        who,
        f"refused: the pickle asks for {one_line(refused.name, 200)}",
        allowed="numbers, text, containers, arrays",
        remedy="it was not executed; get the file from its original source",
    )
