"""What every section of a configuration has in common."""

import difflib
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

__all__ = ["Frozen", "problems"]

WORDS = {
    "missing": "is missing",
    "model_type": "expected a mapping of its keys",
    "too_short": "expected at least one",
}
"""In place of pydantic's own, which speak of its classes."""


class Frozen(BaseModel):
    """Base of every section: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        """Name what is allowed where a key is unknown; pydantic's own message does not."""
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"unknown key {key!r}{hint}; allowed: {', '.join(cls.model_fields)}")
        return data


def problems(error: ValidationError, hidden: Collection[str] = ()) -> str:
    """What is wrong with plain data, and where, in one line.

    Args:
        error: what its section raised.
        hidden: names of variants, which pydantic counts as a part of the place.
    """
    return "; ".join(_problem(item, hidden) for item in error.errors())


def _problem(item: Any, hidden: Collection[str]) -> str:
    where = ".".join(str(part) for part in item["loc"] if part not in hidden)
    message = WORDS.get(item["type"], str(item["msg"]).removeprefix("Value error, "))
    if item["type"] == "missing":
        return f"{where} {message}"
    value = item["input"]
    if item["type"] == "unknown_algorithm" and isinstance(value, dict):
        value = value["name"]
    seen = "" if item["type"] == "value_error" else f", got {value!r}"
    return f"{where}: {message}{seen}" if where else message
