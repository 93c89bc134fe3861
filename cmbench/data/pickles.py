"""Reading pickles without running them: primitives, containers and plain numpy arrays only.

The unpickler never looks a name up by import. A pickle that names anything outside a table of inert
stand-ins is refused, by that name. Imports no torch.
"""

from __future__ import annotations

import io
import os
import pickle  # only its opcode machine, with find_class closed
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np

from cmbench.errors import UserError
from cmbench.files import corrupt

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


class RefusedName(Exception):
    """The pickle names something that is not in the table."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Sealed(type):
    """Metaclass of stand-ins: their attributes cannot be set by a pickle."""

    def __setattr__(cls, name: str, value: object) -> None:
        """Refuse."""
        raise RefusedName(f"a change of {cls.__name__}.{name}")


class Function:
    """A stand-in for a function: it can only be called."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self._call(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse."""
        raise RefusedName(f"a change of a function's {name}")


class DTypeShell(metaclass=Sealed):
    """Stands for ``numpy.dtype``: plain numbers only, never objects or records."""

    def __init__(self, code: object, *_: object) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(text, str) or text.lstrip("<>=|") not in _PLAIN_DTYPES:
            raise RefusedName(f"numpy.dtype({code!r})")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        order = order.decode("ascii") if isinstance(order, bytes) else order
        if order == ">":
            self.dtype = self.dtype.newbyteorder(">")


_PLAIN_DTYPES = frozenset(f"{kind}{n}" for kind in "iuf" for n in (1, 2, 4, 8)) | {"b1"}


class ArrayShell(metaclass=Sealed):
    """Stands for ``numpy.ndarray`` while its state is read; :attr:`array` is the result."""

    array: np.ndarray[Any, Any]

    def __init__(self, *_: object) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array without its five parts of state")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, DTypeShell):
            raise pickle.UnpicklingError("an array without a dtype")
        raw = data.encode("latin1") if isinstance(data, str) else data
        self.array = _shaped(raw, dtype, shape, fortran=bool(fortran))


def _shaped(
    data: bytes, dtype: DTypeShell, shape: Any, *, fortran: bool
) -> np.ndarray[Any, np.dtype[Any]]:
    flat: np.ndarray[Any, np.dtype[Any]] = np.frombuffer(data, dtype.dtype)
    return flat.reshape(tuple(shape), order="F" if fortran else "C")


def _scalar(dtype: DTypeShell, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype.dtype, count=1)[0].item()


def _frombuffer(data: bytes, dtype: DTypeShell, shape: Any, order: str, *_: object) -> ArrayShell:
    """Build what protocol 5 pickles of arrays name."""
    shell = ArrayShell()
    if not isinstance(dtype, DTypeShell) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without a dtype or an order")
    shell.array = _shaped(data, dtype, shape, fortran=order == "F")
    return shell


def _empty_bytes() -> bytes:
    """Build what protocols below 3 write for ``b""``."""
    return b""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding in ("latin1", "latin-1") else "utf-8")


#: What Python 2 and 3 pickles of plain data and arrays name, and what each becomes here.
PLAIN_NAMES: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    **{
        f"{builtins}.{name}": stand_in
        for builtins in ("builtins", "__builtin__")
        for name, stand_in in (
            ("set", set),
            ("frozenset", frozenset),
            ("complex", complex),
            ("bytes", Function(_empty_bytes)),
        )
    },
    "_codecs.encode": Function(_encode),
    "numpy.ndarray": ArrayShell,
    "numpy.dtype": DTypeShell,
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")
        for name, stand_in in (
            ("multiarray._reconstruct", ArrayShell),
            ("multiarray.scalar", Function(_scalar)),
            ("numeric._frombuffer", Function(_frombuffer)),
        )
    },
}


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that takes names from a table only.

    It is pickle's own in Python, not the one in C: there the memo is an array as long as the
    largest index in it, so that five bytes of a file take gigabytes. What a pickle may make from
    what it already holds is bounded by a small multiple of its size.
    """

    # The machine's own parts, which type stubs leave out.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    #: Bytes that calls may be given or make, per byte of the pickle. An ordinary pickle needs
    #: three: a storage's bytes, the storage, and the tensor in it.
    SHARE = 6
    #: What an element of a container counts.
    _ELEMENT = 8
    #: Nested tuples: how many in all, counting repeats, and how deep. As a key of a dict a tuple
    #: is hashed recursively, on the stack of C, each time.
    _MOST_TUPLES, _DEEPEST_TUPLE = 100_000, 1_000

    def __init__(self, file: BinaryIO, names: Mapping[str, Any] = PLAIN_NAMES) -> None:
        # Python 2 strings become bytes: the array data in them survives, text is decoded later.
        super().__init__(file, encoding="bytes")
        self.names = names
        here = file.tell()
        self._size = file.seek(0, os.SEEK_END) - here
        file.seek(here)
        self._left = self.SHARE * self._size + 2**20
        #: Tuples of tuples by identity: the tuple, which keeps that its own; how many; how deep.
        self._nested: dict[int, tuple[tuple[Any, ...], int, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module.name``; refuse every other name."""
        try:
            return self.names[f"{module}.{name}"]
        except KeyError:
            raise RefusedName(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to outside objects."""
        raise RefusedName(f"persistent object {str(pid)[:60]!r}")

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

    def call(self, load: Callable[[Any], None], count: int) -> None:
        """Do an opcode that calls something with the last ``count`` values of the stack."""
        for given in self.stack[-count:]:
            self._spend_on(given, *(given if isinstance(given, tuple) else ()))
        load(self)
        self.measure()

    def measure(self) -> None:
        """Refuse a tuple on top of the stack that nests too many tuples."""
        made = self.stack[-1] if self.stack else None
        inner = [v for v in made if isinstance(v, tuple)] if isinstance(made, tuple) else []
        if not isinstance(made, tuple) or not inner:
            return
        known = [self._nested.get(id(v), (v, 1, 1)) for v in inner]
        count, depth = 1 + sum(k[1] for k in known), 1 + max(k[2] for k in known)
        if count > self._MOST_TUPLES or depth > self._DEEPEST_TUPLE:
            raise RefusedName("tuples nested without end")
        self._nested[id(made)] = (made, count, depth)

    def _bytearray(self) -> None:
        """Read a length and as many bytes; pickle's own makes room for them before it looks."""
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self._size:
            raise pickle.UnpicklingError(f"a bytearray of {length} bytes")
        self.append(bytearray(self.read(length)))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)


def _counted(load: Callable[[Any], None], count: int) -> Callable[[Any], None]:
    return lambda machine: machine.call(load, count)


def _measured(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def measured(machine: RestrictedUnpickler) -> None:
        load(machine)
        machine.measure()

    return measured


#: How many values each calling opcode takes: 0 is all since the last mark.
_CALLS = {
    pickle.REDUCE: 1,
    pickle.NEWOBJ: 1,
    pickle.NEWOBJ_EX: 2,
    pickle.BUILD: 1,
    pickle.OBJ: 0,
    pickle.INST: 0,
}
for _code, _count in _CALLS.items():
    _load = pickle._Unpickler.dispatch[_code[0]]
    RestrictedUnpickler.dispatch[_code[0]] = _counted(_load, _count)
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    RestrictedUnpickler.dispatch[_code[0]] = _measured(pickle._Unpickler.dispatch[_code[0]])
RestrictedUnpickler.dispatch[pickle.BYTEARRAY8[0]] = RestrictedUnpickler._bytearray


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


def load_plain_pickle(file: BinaryIO | bytes, who: str) -> Any:
    """Read a pickle of plain data and arrays; ``who`` names the file in messages.

    Raises ``UserError`` if it is truncated or corrupt, or names anything that plain data does
    not need. Nothing of the file is executed.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return unshell(RestrictedUnpickler(stream).load())
    except RefusedName as refused:
        raise refused_error(who, refused) from None
    except BROKEN as error:
        raise corrupt(who, "pickle", error) from None


def refused_error(who: str, refused: RefusedName) -> UserError:
    """Return the error for a pickle with a refused name."""
    return UserError(
        who,
        f"refused: the pickle asks for {refused.name}",
        allowed="numbers, text, containers, arrays",
        remedy="it was not executed; get the file from its original source",
    )
