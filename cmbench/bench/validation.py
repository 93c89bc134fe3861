"""Validation of recipes and options by the config model that owns them, with helpful errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cmbench.errors import UserError

C = TypeVar("C", bound=BaseModel)


def validate(model: type[C], table: Mapping[str, Any], who: str) -> C:
    """Validate a table by its config model; the error names every bad key and the valid ones."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problems, keys = [], set(model.model_fields)
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "recipe"
            got = f", got {item['input']!r}" if _is_short(item.get("input")) else ""
            problems.append(f"{where}: {item['msg']}{got}")
            if item["type"] == "extra_forbidden":
                keys = _valid_keys(model, item["loc"]) or keys
        raise UserError(
            who, "; ".join(problems), allowed="keys " + ", ".join(sorted(keys)),
            remedy=f"mend the recipe or the -o override of {problems[0].split(':')[0]!r}",
        ) from error


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and len(str(value)) < 60


def _valid_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Return the keys that are valid where an unknown one stood."""
    current: Any = model
    for part in location[:-1]:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        current = field.annotation if field is not None else None
    return set(getattr(current, "model_fields", {}))
