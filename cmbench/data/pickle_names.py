"""What pickles of plain data and arrays may name, and the inert stand-in that each becomes.

Imports no torch.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


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
            shown = repr(text[:40]) if isinstance(text, str) else f"a {type(text).__name__}"
            raise RefusedName(f"numpy.dtype({shown})")
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


def is_nested(value: object) -> bool:
    """Return whether a value is hashed through its elements."""
    return isinstance(value, (tuple, frozenset))


#: Elements, counting those of elements, that a key may have: each use of it hashes all of them.
_LARGEST_KEY = 100


def key_size(key: object) -> int:
    """Return how many elements are hashed with a key of a dict or an element of a set.

    Raises:
        RefusedName: far more than any ordinary key has. Tuples or frozensets that hold one another
            take a time exponential in their number, on the stack of C.
    """
    if not is_nested(key):
        return 1
    waiting, count = [key], 1
    while waiting:
        for value in waiting.pop():  # type: ignore[attr-defined]
            count += 1
            if count > _LARGEST_KEY:
                raise RefusedName("keys nested without end")
            if is_nested(value):
                waiting.append(value)
    return count


def _keyed(kind: Callable[[Any], Any]) -> Function:
    """Return a stand-in for a container that hashes what it is made of."""

    def make(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise pickle.UnpicklingError(f"a {kind.__name__} of a {type(items).__name__}")
        for item in items:
            key_size(item[0] if kind is OrderedDict and isinstance(item, (list, tuple)) else item)
        return kind(items)

    return Function(make)


#: What Python 2 and 3 pickles of plain data and arrays name, and what each becomes here.
PLAIN_NAMES: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _keyed(OrderedDict),
    **{
        f"{builtins}.{name}": stand_in
        for builtins in ("builtins", "__builtin__")
        for name, stand_in in (
            ("set", _keyed(set)),
            ("frozenset", _keyed(frozenset)),
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
