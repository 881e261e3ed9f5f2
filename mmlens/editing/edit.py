"""An edit: what is added to a model's weights, and can be taken off again to the last bit.

    edit = multedit(model, inputs, "Rome", layer=3)
    with edit.applied(model): ...            # and as it was behind the block
    model.apply(edit); edit.revert(model)    # the same in two steps
    edit.save("rome.safetensors"); Edit.load("rome.safetensors")
    (edit + other).merge(model)              # for good: model.save_pretrained(folder)

Weights have the names of `model.named_parameters()`. An edit knows by a hash which weights it was
made for, and is refused by others. While it is applied the original weights are kept, so `revert`
gives back the very same bits, in any dtype.

Several edits may be applied one after the other; what one adds to a weight does not depend on the
others. They are reverted in the opposite order where they touch the same weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmlens.files import write_atomically

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["Delta", "Edit", "LowRank", "fingerprint"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix by its factors: left @ right."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself."""
        return self.left @ self.right


Delta = LowRank | Tensor
"""What is added to a weight: factors, or a tensor of the weight's shape."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What is added to each of some weights of one model.

    Methods make edits with `Edit.of`; `deltas` and `metadata` are for reading.

    Example:
        >>> with edit.applied(model):
        ...     model.generate(inputs)
    """

    deltas: Mapping[str, Delta]
    """By the weight's name, such as "blocks.3.mlp.down.weight"."""
    base: Mapping[str, str]
    """By the same names: `fingerprint` of the weights without any edit."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """How it was made: method, target, layer, settings. What JSON can hold."""

    @classmethod
    def of(
        cls, model: HookedMultimodalTransformer, deltas: Mapping[str, Delta], **metadata: Any
    ) -> Edit:
        """An edit of this model.

        Raises:
            KeyError: the model has no such weight.
            ValueError: a delta of another shape, or one that is not finite.
        """
        for name, delta in deltas.items():
            parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta,)
            if not all(bool(part.isfinite().all()) for part in parts):
                raise ValueError(f"the edit of {name} is not finite: it has diverged")
        base = {name: fingerprint(unedited(model, name)) for name in deltas}
        edit = cls(dict(deltas), base, metadata)
        edit._weights(model)
        return edit

    # On and off

    @contextmanager
    def applied(self, model: HookedMultimodalTransformer) -> Iterator[HookedMultimodalTransformer]:
        """The model with the edit, for the time of a `with` block.

        Raises:
            ValueError: as `apply`.
        """
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    @torch.no_grad()
    def apply(self, model: HookedMultimodalTransformer) -> None:
        """Add the edit to the model's weights, until it is reverted (`model.apply(edit)` too).

        The sum is computed in float32 at least, and rounded once. Until `revert`, the weights that
        it touches are kept a second time.

        Raises:
            KeyError: the model has no such weight.
            ValueError: the edit is applied already, or was made for other weights.
        """
        if self.is_applied(model):
            raise ValueError("this edit is applied to this model already; revert it first")
        self.check(model)
        weights = self._weights(model)
        originals = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.copy_(added(weight, self.deltas[name]))
        except BaseException:
            for name, weight in weights.items():
                weight.copy_(originals[name])
            raise
        _applied.setdefault(model, []).append((self, originals))

    @torch.no_grad()
    def revert(self, model: HookedMultimodalTransformer) -> None:
        """Put the weights back, bit by bit.

        Raises:
            ValueError: the edit is not applied, or a later one to the same weights still is.
        """
        index = self._index(model)
        if index is None:
            raise ValueError("this edit is not applied to this model, so it cannot be reverted")
        applied = _applied[model]
        for later, _ in applied[index + 1 :]:
            if shared := sorted(later.deltas.keys() & self.deltas.keys()):
                raise ValueError(
                    f"an edit applied later ({described(later)}) touches {', '.join(shared[:3])} "
                    "as well: revert that one first"
                )
        _, originals = applied.pop(index)
        for name, weight in self._weights(model).items():
            weight.copy_(originals[name])

    def merge(self, model: HookedMultimodalTransformer) -> None:
        """Make the edit part of the model for good, as for `model.save_pretrained`.

        The model is then another one: edits of its old weights are refused.

        Raises:
            ValueError: another edit is applied to the same weights; or as `apply`.
        """
        for other, _ in _applied.get(model, []):
            if other is not self and (shared := sorted(other.deltas.keys() & self.deltas.keys())):
                raise ValueError(
                    f"another edit ({described(other)}) is applied to {', '.join(shared[:3])}: "
                    "revert it before merging, or merge the sum of both"
                )
        if not self.is_applied(model):
            self.apply(model)
        index = self._index(model)
        assert index is not None  # it has just been applied
        _applied[model].pop(index)

    def is_applied(self, model: HookedMultimodalTransformer) -> bool:
        """Whether the model has this edit now."""
        return self._index(model) is not None

    def _index(self, model: HookedMultimodalTransformer) -> int | None:
        edits = [edit for edit, _ in _applied.get(model, [])]
        return next((index for index, edit in enumerate(edits) if edit is self), None)

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Raise unless the edit was made for this model's weights (other edits left aside).

        Raises:
            KeyError: the model has no such weight.
            ValueError: one of another shape or with other values.
        """
        self._weights(model)
        for name, expected in self.base.items():
            found = fingerprint(unedited(model, name))
            if found != expected:
                raise ValueError(
                    f"this edit ({described(self)}) was made for another model: the hash of {name} "
                    f"is {found[:12]} here and was {expected[:12]} there. Apply it to the weights "
                    "that it was made for, or make it anew"
                )

    def _weights(self, model: HookedMultimodalTransformer) -> dict[str, Tensor]:
        weights = {name: weight_of(model, name) for name in self.deltas}
        for name, delta in self.deltas.items():
            if tuple(delta.shape) != tuple(weights[name].shape):
                raise ValueError(
                    f"the edit of {name} is {list(delta.shape)}, the weight "
                    f"{list(weights[name].shape)}: they belong to different models"
                )
        return weights

    # Several

    def __add__(self, other: Edit) -> Edit:
        """Both edits as one; factors are put side by side.

        Raises:
            ValueError: they were made for different weights.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        for name in self.base.keys() & other.base.keys():
            if self.base[name] != other.base[name]:
                raise ValueError(
                    f"these edits were made for different models: the hash of {name} is "
                    f"{self.base[name][:12]} for one and {other.base[name][:12]} for the other"
                )
        deltas = dict(self.deltas)
        for name, delta in other.deltas.items():
            deltas[name] = total(deltas[name], delta) if name in deltas else delta
        parts = [part for edit in (self, other) for part in edit.parts]
        return Edit(deltas, {**self.base, **other.base}, {"method": "sum", "parts": parts})

    def __radd__(self, other: object) -> Edit:
        """For `sum(edits)`, which begins with 0."""
        return self if other == 0 else NotImplemented

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The metadata of each edit that this one is the sum of."""
        return self.metadata["parts"] if self.metadata.get("method") == "sum" else [self.metadata]

    # In a file

    def save(self, path: str | Path) -> Path:
        """Write the edit to one safetensors file, which appears only when it is complete."""
        tensors: dict[str, Tensor] = {}
        for name, delta in self.deltas.items():
            if isinstance(delta, LowRank):
                tensors |= {f"{name}.left": delta.left, f"{name}.right": delta.right}
            else:
                tensors[f"{name}.dense"] = delta
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        rest = json.dumps({"base": dict(self.base), "metadata": self.metadata})
        return write_atomically(path, save(tensors, {"Edit": rest}))

    @classmethod
    def load(cls, path: str | Path, model: HookedMultimodalTransformer | None = None) -> Edit:
        """Read what `save` wrote.

        Args:
            model: the model that it is meant for, to be told at once if it is another one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else, or an edit of another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                rest = json.loads((file.metadata() or {})["Edit"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            deltas = {name: delta_from(tensors, name) for name in rest["base"]}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no Edit") from error
        edit = cls(deltas, rest["base"], rest["metadata"])
        if model is not None:
            edit.check(model)
        return edit


_applied: WeakKeyDictionary[Any, list[tuple[Edit, dict[str, Tensor]]]] = WeakKeyDictionary()
"""Per model the edits that it has, in their order, each with the weights that it found."""


def weight_of(model: HookedMultimodalTransformer, name: str) -> Tensor:
    """The parameter of a name.

    Raises:
        KeyError: there is none.
    """
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise KeyError(
            f"the model has no weight {name!r}; an edit's names are those of "
            "model.named_parameters(), such as 'blocks.0.mlp.down.weight'"
        ) from error


def unedited(model: HookedMultimodalTransformer, name: str) -> Tensor:
    """A weight as it is without the edits that are applied."""
    for _, originals in _applied.get(model, []):
        if name in originals:
            return originals[name]
    return weight_of(model, name)


def fingerprint(weight: Float[Tensor, "*shape"]) -> str:
    """A hash of shape and values: the same for bfloat16 weights and their copy in float32."""
    wide = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32)).contiguous()
    digest = hashlib.sha256(str(tuple(wide.shape)).encode())
    digest.update(wide.flatten().numpy().data)
    return digest.hexdigest()


def added(weight: Float[Tensor, "*shape"], delta: Delta) -> Float[Tensor, "*shape"]:
    """The sum, computed in float32 at least and rounded once, to the weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(delta, LowRank):
        delta = LowRank(*(part.to(weight.device, wide) for part in (delta.left, delta.right)))
    return (weight.to(wide) + dense(delta).to(weight.device, wide)).to(weight.dtype)


def dense(delta: Delta) -> Tensor:
    """A delta as one tensor."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def total(one: Delta, other: Delta) -> Delta:
    """The sum of two deltas of one weight, in the wider of their dtypes."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        dtype = torch.promote_types(one.left.dtype, other.left.dtype)
        left, right = other.left.to(one.left.device, dtype), other.right.to(one.left.device, dtype)
        return LowRank(
            torch.cat([one.left.to(dtype), left], dim=1),
            torch.cat([one.right.to(dtype), right], dim=0),
        )
    return dense(one) + dense(other).to(dense(one).device)


def delta_from(tensors: Mapping[str, Tensor], name: str) -> Delta:
    """The delta of a weight among the tensors of a file."""
    if f"{name}.dense" in tensors:
        return tensors[f"{name}.dense"]
    return LowRank(tensors[f"{name}.left"], tensors[f"{name}.right"])


def described(edit: Edit) -> str:
    """An edit in a few words, for error messages."""
    parts = edit.parts
    first = f"{parts[0].get('method', 'edit')} to {parts[0].get('target', '?')!r}"
    return first if len(parts) == 1 else f"{first} and {len(parts) - 1} more"
