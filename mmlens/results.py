"""What results of analyses have in common: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmlens.files import write_atomically

Result = TypeVar("Result")


class SavedResult:
    """A frozen dataclass of tensors, and of fields that JSON can hold, in a file.

    Lists of JSON come back as tuples, but for those inside of a dict.

    Example:
        >>> contribution.save("it.safetensors"); AttentionContribution.load("it.safetensors")
    """

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, which appears only when it is complete."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        tensors = {name: x.contiguous() for name, x in values.items() if isinstance(x, Tensor)}
        rest = {name: x for name, x in values.items() if name not in tensors}
        return write_atomically(path, save(tensors, {type(self).__name__: json.dumps(rest)}))

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                rest = json.loads((file.metadata() or {})[cls.__name__])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no {cls.__name__}") from error
        return cls(**tensors, **{name: as_tuples(value) for name, value in rest.items()})


def as_tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
