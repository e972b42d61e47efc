"""The base class of all sections of the recipe."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the recipe. It refuses unknown keys and validates assigned values."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


def digest(*values: Any) -> str:
    """A short, stable hash of JSON-like values (16 hex digits of SHA-256)."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
