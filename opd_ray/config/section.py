"""What every section of a configuration has in common."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Frozen"]


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
