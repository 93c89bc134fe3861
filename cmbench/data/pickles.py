"""Reading pickles without running them: primitives, containers and plain numpy arrays only.

The unpickler never looks a name up by import. A pickle that names anything outside a table of inert
stand-ins is refused, by that name. Imports no torch.
"""

from __future__ import annotations

import io
import pickle  # only the opcode machine of Unpickler, with find_class closed
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from cmbench.errors import UserError

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
)


class RefusedName(Exception):
    """The pickle names something that is not in the table."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Sealed(type):
    """Metaclass of stand-ins: a pickle may set attributes of what it names, but not of these."""

    def __setattr__(cls, name: str, value: object) -> None:
        """Refuse."""
        raise RefusedName(f"a change of {cls.__name__}.{name}")


class Function:
    """A stand-in for a function: can be called, and nothing else can be done to it."""

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


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler whose names come from a table and from nowhere else."""

    def __init__(self, file: BinaryIO, names: Mapping[str, Any] = PLAIN_NAMES) -> None:
        # Python 2 strings become bytes: the array data in them survives, text is decoded later.
        super().__init__(file, encoding="bytes")
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module.name``; refuse every other name."""
        try:
            return self.names[f"{module}.{name}"]
        except KeyError:
            raise RefusedName(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to outside objects."""
        raise RefusedName(f"persistent object {str(pid)[:60]!r}")


def unshell(value: Any) -> Any:
    """Return ``value`` with array shells replaced by arrays, in dicts, lists and tuples."""
    if isinstance(value, ArrayShell):
        return value.array
    if isinstance(value, dict):
        return {
            k.decode("utf-8", "replace") if isinstance(k, bytes) else k: unshell(v)
            for k, v in value.items()
        }
    if isinstance(value, list) and any(isinstance(v, (ArrayShell, dict, list)) for v in value):
        return [unshell(v) for v in value]
    if isinstance(value, tuple):
        return tuple(unshell(v) for v in value)
    return value


def load_plain_pickle(file: BinaryIO | bytes, who: str) -> Any:
    """Read a pickle of plain data and arrays; ``who`` names the file in messages.

    Raises ``UserError`` if it is truncated or corrupt, or names anything that plain data has no
    need of. Nothing of the file is ever executed.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return unshell(RestrictedUnpickler(stream).load())
    except RefusedName as refused:
        raise refused_error(who, refused) from None
    except BROKEN as error:
        raise broken_error(who, error) from None


def refused_error(who: str, refused: RefusedName) -> UserError:
    """Return the error for a pickle that names something it must not."""
    return UserError(
        who,
        f"refused: the pickle asks for {refused.name}",
        allowed="numbers, text, containers, arrays",
        remedy="it was not executed; get the file from its original source",
    )


def broken_error(who: str, error: BaseException) -> UserError:
    """Return the error for a pickle that ends early or makes no sense."""
    detail = " ".join(str(error).split())[:120]
    return UserError(
        who,
        f"truncated or corrupt pickle ({type(error).__name__}: {detail})",
        remedy="download it again and compare its size and hash with the original's",
    )
