"""What the fields of a configuration may be."""

from __future__ import annotations

import math
from typing import Any


def check_sizes(config: Any, *names: str, least: int = 1) -> None:
    """Raise a ValueError where a field of a configuration is no whole number from `least` up."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}; it must be a whole number from {least} up")


def check_cap(name: str, value: Any) -> None:
    """Raise a ValueError where a softcap or a factor is neither None nor a positive number."""
    if value is not None and not (is_finite(value) and value > 0):
        raise ValueError(f"{name}={value!r}; it must be a finite number above 0, or None")


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
