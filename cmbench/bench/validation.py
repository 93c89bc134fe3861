"""Validation of recipes and options by the config model that owns them, with helpful errors."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from cmbench.errors import UserError

C = TypeVar("C", bound=BaseModel)


def validate(model: type[C], table: Mapping[str, Any], who: str) -> C:
    """Validate a table by its config model; the error names every bad key and the valid ones."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problems, keys, close = [], set(model.model_fields), ""
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "recipe"
            got = f", got {item['input']!r}" if _is_short(item.get("input")) else ""
            if item["type"] == "extra_forbidden":
                keys = _valid_keys(model, item["loc"]) or keys
                close = close or _near(str(item["loc"][-1]), keys)
                problems.append(f"{where}: unknown key")
            else:
                problems.append(f"{where}: {item['msg']}{got}")
        first = problems[0].split(":")[0]
        raise UserError(
            who, "; ".join(problems), allowed="keys " + ", ".join(sorted(keys)),
            remedy=close or f"mend the recipe or the -o override of {first!r}",
        ) from error


def _near(key: str, keys: set[str]) -> str:
    found = get_close_matches(key, sorted(keys), n=1)
    return f"did you mean {found[0]!r}?" if found else ""


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and len(str(value)) < 60


def _valid_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Return the keys that are valid where an unknown one stood."""
    current: type[BaseModel] | None = model
    for part in location[:-1]:
        if isinstance(part, int):  # a place in a list of tables
            continue
        field = current.model_fields.get(part) if current else None
        current = _model_in(field.annotation) if field else None
    return set(current.model_fields) if current else set()


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation such as ``tuple[Model, ...] | None`` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
