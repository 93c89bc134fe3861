"""A restricted unpickler for networks: tensors, primitives, and inert descriptions of classes.

EDM's ``.pkl`` files (and EDM2's, ECT's, TCM's) pickle whole ``torch.nn.Module`` objects together
with their source code, which loading is meant to execute. Here nothing is imported and nothing is
executed: a module becomes an :class:`InertObject`, its source code an unread string, a bound method
an :class:`InertAttribute`, and a name that is in no table is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from torch import Tensor

from cmbench.data.pickle_names import Function, RefusedName, Sealed
from cmbench.data.pickles import unpickling, unshell
from cmbench.errors import UserError
from cmbench.files import regular
from cmbench.importers.tensors import TENSOR_NAMES, TensorUnpickler, storage_from_bytes

#: Modules whose classes may be described (never used): torch's layers, and EDM's persistence.
_LAYERS = re.compile(r"torch\.nn\.modules\.\w+\.[A-Za-z_]\w*")
_PERSISTENT = re.compile(r"(\w+\.)*torch_utils\.persistence\._reconstruct_persistent_obj")
_EASY_DICT = re.compile(r"(\w+\.)*dnnlib\.util\.EasyDict")


class InertObject(metaclass=Sealed):
    """What a pickle said about an object: its class's name and its state. It does nothing."""

    class_name = "?"
    #: A pickle can make an object without calling its class.
    state: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *_: object) -> None:
        """Take whatever the class would be called with."""

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}


class _Dict(dict[str, Any], metaclass=Sealed):
    """Stands for a dict with attribute access."""

    def __init__(self, *given: object) -> None:
        if given:
            raise RefusedName("a dict made of other values")

    def __setstate__(self, state: object) -> None:
        """Ignore what the class would keep beside its items."""


@lru_cache(maxsize=1024)
def _layer(name: str) -> type[InertObject]:
    return type("InertLayer", (InertObject,), {"class_name": name})


class InertAttribute(metaclass=Sealed):
    """Stands for an attribute of a described object, such as a bound method. It does nothing.

    A bound method pickles as ``getattr(object, name)``: ECT's loss keeps its schedule so.
    """

    def __init__(self, owner: InertObject, name: str) -> None:
        self.owner, self.name = owner, name

    def __setstate__(self, state: object) -> None:
        """Refuse: a bound method has no state of its own."""
        raise RefusedName("a change of an attribute")


def _attribute(owner: object, name: object, *more: object) -> InertAttribute:
    """Record which attribute of which described object a pickle asks for; resolve nothing."""
    if more or not isinstance(owner, InertObject) or not isinstance(name, str):
        raise RefusedName("builtins.getattr")
    return InertAttribute(owner, name)


def _persistent(meta: object, *_: object) -> InertObject:
    """Describe an object that EDM's persistence would rebuild from its own source code."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise RefusedName("a persistent object without a state")
    name = meta.get("class_name")
    described = _layer(name if isinstance(name, str) else "?")()
    described.state = meta["state"]
    return described


_NAMES: Mapping[str, Callable[..., Any]] = {
    **TENSOR_NAMES,
    **{f"{builtins}.getattr": Function(_attribute) for builtins in ("builtins", "__builtin__")},
    "torch.storage._load_from_bytes": Function(storage_from_bytes),
}


class NetworkUnpickler(TensorUnpickler):
    """Builds tensors, primitives and inert descriptions."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, _NAMES)

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module.name``; refuse every other name."""
        full = f"{module}.{name}"
        if _PERSISTENT.fullmatch(full):
            return Function(_persistent)
        if _EASY_DICT.fullmatch(full):
            return _Dict
        if _LAYERS.fullmatch(full):
            return _layer(full)
        return super().find_class(module, name)


def load_network_pickle(path: Path) -> Any:
    """Read a pickle of networks.

    Raises ``UserError`` if it is truncated or corrupt, or names anything but tensors, plain data,
    layers of torch and EDM's persistent objects. Nothing of the file is executed.
    """
    with unpickling(f"checkpoint {path}"), regular(path).open("rb") as file:
        return unshell(NetworkUnpickler(file).load())


# ---- what an inert module holds ----------------------------------------------------------------


def is_module(value: object) -> bool:
    """Return whether ``value`` describes a ``torch.nn.Module``."""
    return isinstance(value, InertObject) and isinstance(value.state.get("_parameters"), dict)


#: More modules or a deeper nesting than any published network has by far.
_MOST_MODULES, _DEEPEST = 20_000, 50


def walk(module: InertObject) -> Iterator[tuple[str, InertObject]]:
    """Yield a described module and everything below it, by name.

    Raises ``UserError`` if a module lies within itself, or there are absurdly many.
    """
    waiting, count = [("", module, 0)], 0
    while waiting:
        prefix, part, depth = waiting.pop()
        count += 1
        if count > _MOST_MODULES or depth > _DEEPEST:
            raise UserError(
                "checkpoint",
                f"its modules are nested without end (at {prefix[:60]!r})",
                allowed=f"up to {_MOST_MODULES} modules, {_DEEPEST} deep",
                remedy="get the file from its original source",
            )
        yield prefix, part
        children = reversed(_table(part, "_modules").items())
        waiting += [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in children
            if isinstance(child, InertObject)
        ]


def _table(module: InertObject, name: str) -> dict[str, Any]:
    """Return a dict of a described module's state; empty where it has none."""
    table = module.state.get(name)
    if table is None or isinstance(table, dict):
        return table or {}
    raise UserError(
        "checkpoint",
        f"a module's {name} is a {type(table).__name__}",
        allowed="a dict",
        remedy="get the file from its original source",
    )


def state_dict(module: InertObject) -> dict[str, Tensor]:
    """Return the state dict that the described module would have."""
    tensors: dict[str, Tensor] = {}
    for prefix, part in walk(module):
        hidden = part.state.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple, dict)) else ()
        for kind in ("_parameters", "_buffers"):
            for name, value in _table(part, kind).items():
                if isinstance(value, Tensor) and name not in hidden:
                    tensors[f"{prefix}{name}"] = value
    return tensors


def plain_facts(value: Any, depth: int = 4) -> Any:
    """Return what of ``value`` can be written as JSON, for the record; the rest by its type.

    At most a thousand values: a file may hold one container in a thousand places.
    """
    return _plain(value, depth, [1000])


def _plain(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if value is None or isinstance(value, (bool, int, float, str)):
        return value if not isinstance(value, str) else value[:500]
    if isinstance(value, dict) and depth:
        return {str(k)[:500]: _plain(v, depth - 1, left) for k, v in value.items() if left[0] > 0}
    if isinstance(value, (list, tuple)) and depth:
        return [_plain(v, depth - 1, left) for v in value[:100] if left[0] > 0]
    if isinstance(value, InertObject):
        return value.class_name
    if isinstance(value, InertAttribute):
        return f"{value.owner.class_name}.{value.name}"[:500]
    return type(value).__name__
