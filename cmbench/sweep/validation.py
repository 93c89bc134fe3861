"""Validation of recipes and options by the config model that owns them, with helpful errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cmbench.errors import UserError

C = TypeVar("C", bound=BaseModel)


#: Constraints of annotated-types that pydantic keeps with a field, as they are written.
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def validate(
    model: type[C], table: Mapping[str, Any], who: str, prefix: str = "", *, remedy: str = ""
) -> C:
    """Validate a table by its config model.

    ``prefix`` is what a user writes before the keys of the table (``network.``); ``remedy`` is what
    to do where no known key is near, by default to correct the recipe.

    Raises:
        UserError: it names every unknown key and invalid value, and what is valid.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problems, places, values, close = [], [], [], ""
        keys: set[str] = set()
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "recipe"
            places.append(where)
            got = f", got {item['input']!r}" if _is_short(item.get("input")) else ""
            if item["type"] == "extra_forbidden":
                owner = owner_of(model, item["loc"])
                keys = set(owner.model_fields) if owner else keys
                near = get_close_matches(str(item["loc"][-1]), sorted(keys), n=1)
                close = close or (f"did you mean {near[0]!r}?" if near else "")
                problems.append(f"{where}: unknown key")
            else:
                message = item["msg"].removeprefix("Value error, ")
                problems.append(f"{where}: {message}{got}")
                values.append(_valid_values(model, item["loc"], prefix + where, item["msg"]))
        known = ["keys " + ", ".join(sorted(keys))] if keys else []
        raise UserError(
            who,
            "; ".join(problems),
            allowed="; ".join([*known, *filter(None, values)]),
            remedy=close
            or remedy
            or f"correct the recipe or the -o override of {prefix + places[0]!r}",
        ) from error


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and len(str(value)) < 60


def _valid_values(
    model: type[BaseModel], location: tuple[int | str, ...], name: str, message: str
) -> str:
    """Return the valid values of a field: its constraints and description, or pydantic's words."""
    owner = owner_of(model, location)
    field = owner.model_fields.get(str(location[-1])) if owner and location else None
    signs = [
        f"{sign} {getattr(rule, key):g}"
        for rule in (field.metadata if field else ())
        for key, sign in _SIGNS.items()
        if getattr(rule, key, None) is not None
    ]
    if field is not None and signs:
        meaning = f", {field.description}" if field.description else ""
        return f"{name} {' and '.join(signs)}{meaning}"
    expected = message.removeprefix("Input should be ")
    return f"{name}: {expected}" if expected != message else ""


def takes_list(model: type[BaseModel], key: str) -> bool:
    """Say whether the option of a dotted key takes a list; an unknown one may."""
    place = tuple(key.split("."))
    owner = owner_of(model, place)
    field = owner.model_fields.get(place[-1]) if owner is not None else None
    return field is None or _holds_list(field.annotation)


def _holds_list(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if annotation in (Any, list, tuple) or origin in (list, tuple, set, frozenset, Sequence):
        return True
    return origin is not dict and any(map(_holds_list, get_args(annotation)))


def owner_of(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Return the model that has the last part of a location as a field."""
    current: type[BaseModel] | None = model
    for part in location[:-1]:
        if isinstance(part, int):  # a place in a list of tables
            continue
        field = current.model_fields.get(part) if current else None
        current = _model_in(field.annotation) if field else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation such as ``tuple[Model, ...] | None`` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
