"""What results of analyses have in common: a file, a figure, a table, a description."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from jaxtyping import jaxtyped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer
    from mmlens.plots.figure import Figure

Result = TypeVar("Result", bound="SavedResult")


class SavedResult:
    """A frozen dataclass of tensors, and of fields that JSON can hold, in a file.

    Lists of JSON come back as tuples, but for those inside of a dict.

    Example:
        >>> contribution.save("it.safetensors"); AttentionContribution.load("it.safetensors")
    """

    SIZES: ClassVar[Mapping[str, str]] = {}
    """Fields that are tuples, by the dimension of the tensors whose length they have."""

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, which appears only when it is complete.

        Raises:
            OSError: it cannot be written; the error has the path.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        tensors = {name: x.contiguous() for name, x in values.items() if isinstance(x, Tensor)}
        rest = {name: x for name, x in values.items() if name not in tensors}
        text = json.dumps(rest, default=plain_number)
        return write_atomically(path, save(tensors, {type(self).__name__: text}))

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else, or with fields that are missing, too many, or of
                another kind; the message has the path.
        """
        rest, tensors = read_tensors(path, cls.__name__)
        values = {**tensors, **{name: as_tuples(value) for name, value in rest.items()}}
        if problem := problem_with(cls, values):
            raise ValueError(f"{path} holds no {cls.__name__}: {problem}")
        return cls(**values)

    def plot(self, *arguments: Any, **options: Any) -> Figure:
        """Draw the result.

        Args:
            arguments, options: those of the function of `mmlens.plots` that draws this kind, see
                `mmlens.plots.results`.

        Raises:
            TypeError: there is no figure of this kind.
        """
        from mmlens.plots.results import draw

        return draw(self, *arguments, **options)


def plain_number(value: Any) -> Any:
    """Return a number of numpy's or torch's, such as a seed, as JSON holds it."""
    if not hasattr(value, "item"):
        raise TypeError(f"a result holds {type(value).__name__} {value!r}, which JSON cannot")
    return value.item()


def description(model: HookedMultimodalTransformer, inputs: MultimodalInputs) -> dict[str, Any]:
    """Return what a result says of where it is from: the model and the prompt."""
    return {"model": model.cfg.model_name, "prompt": inputs.texts[0] if inputs.texts else ""}


def long_table(axes: Mapping[str, Iterable[Any]], values: Mapping[str, Tensor]) -> pd.DataFrame:
    """Return a row for each element of tensors of one shape: its coordinates, and the values."""
    import pandas as pd

    index = pd.MultiIndex.from_product(axes.values(), names=list(axes))
    columns = {name: each.flatten().tolist() for name, each in values.items()}
    return pd.DataFrame(columns, index=index).reset_index()


def read_tensors(path: str | Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON object that a safetensors file holds under a name, and its tensors."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not Path(path).is_file():
        raise ValueError(f"{path} holds no {name}: it is no file")
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads((file.metadata() or {})[name])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except KeyError as error:
        raise ValueError(f"{path} holds no {name}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} holds no {name}: {reason}") from error
    if not isinstance(rest, dict):
        raise ValueError(f"{path} holds no {name}: its fields are no object")
    return rest, tensors


def as_tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def problem_with(cls: type[SavedResult], values: Mapping[str, Any]) -> str:
    """Return what is wrong with values for the fields of a result, or nothing."""
    hints = get_type_hints(cls)
    known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known.keys()):
        return f"it has no field {', '.join(unknown)}"
    sizes: dict[str, int] = {}
    for name, each in known.items():
        if name not in values:
            if each.default is MISSING and each.default_factory is MISSING:
                return f"{name} is missing"
        elif not matches(values[name], hints[name]):
            return f"{name} must be {each.type}"
        elif isinstance(values[name], Tensor):
            for dimension, size in dimensions(hints[name], values[name].shape):
                if sizes.setdefault(dimension, size) != size:
                    return f"{name} has {size} along {dimension!r}, others {sizes[dimension]}"
    for name, dimension in cls.SIZES.items():
        if len(values[name]) != sizes[dimension]:
            return f"{len(values[name])} {name} for {sizes[dimension]} along {dimension!r}"
    return ""


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says, down to what tuples and dicts hold."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(matches(value, each) for each in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        expected = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(expected) and all(map(matches, value, expected))
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(
            matches(k, key) and matches(v, item) for k, v in value.items()
        )
    if origin is list:
        return isinstance(value, list) and all(matches(each, arguments[0]) for each in value)
    if isinstance(value, bool) and hint in (int, float):
        return False
    if not isinstance(value, Tensor):
        return isinstance(value, int | float if hint is float else hint)
    with jaxtyped("context"):  # its sizes are no other tensor's, in a caller that is checked, say
        return isinstance(value, hint)


def dimensions(hint: Any, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    """Return the named dimensions of a tensor and their sizes; those of a `*name` are left out."""
    for each in get_args(hint):  # of a tensor that may be missing
        if hasattr(each, "dim_str"):
            hint = each
    names = hint.dim_str.split()
    before = next((i for i, name in enumerate(names) if name.startswith("*")), len(names))
    after = len(names) - before - 1
    pairs = list(zip(names[:before], shape, strict=False))
    if after > 0:
        pairs += list(zip(names[-after:], shape[-after:], strict=True))
    return [(name, size) for name, size in pairs if not name.isdigit()]
