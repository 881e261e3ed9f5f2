"""Cases of a test that takes seconds each: some run always, the others among the slow tests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def some_fast(argument: str, cases: Mapping[str, Any], fast: Collection[str]) -> Any:
    """Parametrise a test by cases with names, of which those in `fast` alone are not slow."""
    assert set(fast) <= set(cases), f"{fast} are not all among {list(cases)}"
    return pytest.mark.parametrize(
        argument,
        [
            pytest.param(case, id=name, marks=() if name in fast else pytest.mark.slow)
            for name, case in cases.items()
        ],
    )
