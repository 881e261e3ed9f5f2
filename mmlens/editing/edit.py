"""An edit: what is added to a model's weights, and can be taken off again to the last bit.

    edit = multedit(model, inputs, "Rome", layer=3)
    with edit.applied(model): ...            # and as it was after the block
    edit.apply(model); edit.revert(model)    # the same in two steps
    edit.save("rome.safetensors"); Edit.load("rome.safetensors")
    (edit + other).merge(model)              # for good: model.save_pretrained(folder)

Weights have the names of `model.named_parameters()`. An edit knows by hashes which weights it was
made for, and is refused by others; the same weights rounded to another dtype are not others, so an
edit of a float32 model can be applied to its bfloat16 copy, and the other way round. While it is
applied the original weights are kept, so `revert` gives back the very same bits, in any dtype, also
after an `apply` or `revert` that was interrupted.

Several edits may be applied one after the other; what one adds to a weight does not depend on the
others. They are reverted in the opposite order where they touch the same weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from mmlens.analyses.result import matches, read_tensors
from mmlens.editing.applied import (
    Applied,
    applied_to,
    edit_in_words,
    resting_on,
    take_off,
    unedited,
    weight_of,
)
from mmlens.editing.deltas import Delta, LowRank, added, delta_is_finite, total
from mmlens.editing.edit_check import EditCheck, Origin, check_edit, joined_origin
from mmlens.editing.fingerprints import disagreement, fingerprints, first_hash, in_common
from mmlens.utils.files import write_atomically
from mmlens.utils.grad_mode import gradients
from mmlens.utils.temporary import Changes, temporary

if TYPE_CHECKING:
    from mmlens.editing.request import EditRequest
    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["Delta", "Edit", "LowRank"]


Hashes = dict[str, dict[str, str]]
"""By a weight's name and a dtype."""


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
    base: Mapping[str, Mapping[str, str]]
    """By the same names: `fingerprints` of the weights without any edit."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """How it was made: method, target, layer, settings. What JSON can hold."""
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    """By the weight's name, the inputs [in, key] that get new outputs, where the method has such:
    a later edit of the weight keeps what they get."""
    origin: Origin | None = None
    """What it was made of, in this process; it is not saved."""

    @classmethod
    def of(
        cls,
        model: HookedMultimodalTransformer,
        deltas: Mapping[str, Delta],
        *,
        keys: Mapping[str, Tensor] | None = None,
        origin: Origin | None = None,
        **metadata: Any,
    ) -> Edit:
        """An edit of this model.

        Args:
            model: whose weights are edited.
            deltas: by the weights' names.
            keys: as the field.
            origin: as the field.
            metadata: how it was made.

        Raises:
            KeyError: the model has no such weight.
            ValueError: a delta of another shape, or one that is not finite.
        """
        for name, delta in deltas.items():
            if not delta_is_finite(delta):
                raise ValueError(f"the edit of {name} is not finite: it has diverged")
        base = {name: fingerprints(unedited(model, name)) for name in deltas}
        edit = cls(dict(deltas), base, metadata, dict(keys or {}), origin)
        edit._weights(model)
        return edit

    # On and off

    @temporary
    def applied(self, model: HookedMultimodalTransformer) -> Changes[HookedMultimodalTransformer]:
        """The model with the edit, for the time of a `with` block.

        After it the weights are what they were before, whatever has ended the block. Other threads
        that run the model wait until then.

        Raises:
            ValueError: as `apply`; or, after the block, where an edit of the same weights that was
                applied in it had not been reverted. Both are off then.
        """
        yield model.exclusive()
        self.check_is_off(model)
        yield partial(take_off, model, self)
        self.apply(model)
        return model

    def apply(self, model: HookedMultimodalTransformer) -> None:
        """Add the edit to the model's weights, until it is reverted.

        The sum is computed in float32 at least, and rounded once. Until `revert`, the weights that
        it touches are kept a second time. Whatever interrupts it, the weights are as they were, or
        `is_applied` is true and `revert` makes them so.

        Raises:
            KeyError: the model has no such weight.
            ValueError: the edit is applied already, or was made for other weights.
        """
        with model.run_lock.held(is_run=True):
            self.check_is_off(model)
            self.check_weights(model)
            weights = self._weights(model)
            originals = {name: weight.detach().clone() for name, weight in weights.items()}
            try:
                applied_to(model).append(Applied(self, originals))
                with gradients(False):
                    for name, weight in weights.items():
                        weight.copy_(added(weight, self.deltas[name]))
            except BaseException:
                try:
                    take_off(model, self)
                finally:
                    take_off(model, self)
                raise

    def revert(self, model: HookedMultimodalTransformer) -> None:
        """Put the weights back, bit by bit. What was interrupted can be done again.

        Raises:
            ValueError: the edit is not applied, or a later one to the same weights still is.
        """
        with model.run_lock.held(is_run=True):
            if not self.is_applied(model):
                raise ValueError("this edit is not applied to this model, so it cannot be reverted")
            _, *later = resting_on(model, self)
            if later:
                shared = sorted(later[0].edit.deltas.keys() & self.deltas.keys())
                raise ValueError(
                    f"an edit applied later ({edit_in_words(later[0].edit)}) touches "
                    f"{', '.join(shared[:3])} as well: revert that one first"
                )
            take_off(model, self)

    def merge(self, model: HookedMultimodalTransformer) -> None:
        """Make the edit part of the model for good, as for `model.save_pretrained`.

        The model is then another one: edits of its old weights are refused.

        Raises:
            ValueError: another edit is applied to the same weights; or as `apply`.
        """
        with model.run_lock.held(is_run=True):
            for other in applied_to(model):
                shared = sorted(other.edit.deltas.keys() & self.deltas.keys())
                if other.edit is not self and shared:
                    raise ValueError(
                        f"another edit ({edit_in_words(other.edit)}) is applied to "
                        f"{', '.join(shared[:3])}: revert it before merging, or merge the sum of "
                        "both"
                    )
            if not self.is_applied(model):
                self.apply(model)
            applied_to(model).remove(resting_on(model, self)[0])

    def check_is_off(self, model: HookedMultimodalTransformer) -> None:
        """Raise a ValueError if the model has this edit now."""
        if self.is_applied(model):
            raise ValueError("this edit is applied to this model already; revert it first")

    def is_applied(self, model: HookedMultimodalTransformer) -> bool:
        """Whether the model has this edit now."""
        return any(each.edit is self for each in applied_to(model))

    def check_weights(self, model: HookedMultimodalTransformer) -> None:
        """Raise unless the edit was made for this model's weights (other edits left aside).

        Weights of another dtype are the same if one of them is the other, rounded.

        Raises:
            KeyError: the model has no such weight.
            ValueError: one of another shape or with other values.
        """
        self._weights(model)
        for name, expected in self.base.items():
            if difference := disagreement(unedited(model, name), expected):
                raise ValueError(
                    f"this edit ({edit_in_words(self)}) was made for another model: {name} "
                    f"{difference}. Apply it to the weights that it was made for, or make it anew"
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

    # What else it does

    def check(
        self,
        model: HookedMultimodalTransformer | None = None,
        inputs: MultimodalInputs | EditRequest | None = None,
        *,
        references: Any = "auto",
    ) -> EditCheck:
        """Ask references that the edit was not told of, before and after it.

        The model is left as it is found, with the edit or without it.

        Args:
            model: by default the one that the edit was made for.
            inputs: what it is about: the prompt, or a request; by default that for which it was
                made. Both must be given for an edit from a file.
            references: as in `multedit`; by default those of which it kept a part. Those that are
                held out are asked.

        Raises:
            ValueError: the model or the prompt is not known, there are no references to ask, the
                edit was made for another model, or a later edit of the same weights is on.

        Example:
            >>> check = edit.check()
            >>> check.summary(); check.warning
        """
        return check_edit(self, model, inputs, references)

    # Several

    def __add__(self, other: Edit) -> Edit:
        """Both edits as one; factors are put side by side.

        Raises:
            ValueError: they were made for different weights.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        base = {**self.base, **other.base}
        for name in self.base.keys() & other.base.keys():
            base[name] = in_common(self.base[name], other.base[name])
            if not base[name]:
                raise ValueError(
                    f"these edits were made for different models: the hash of {name} is "
                    f"{first_hash(self.base[name])} for one and {first_hash(other.base[name])} for "
                    "the other"
                )
        deltas = dict(self.deltas)
        for name, delta in other.deltas.items():
            deltas[name] = total(deltas[name], delta) if name in deltas else delta
        keys = dict(self.keys)
        for name, each in other.keys.items():
            keys[name] = torch.cat([keys[name], each.to(keys[name])], 1) if name in keys else each
        parts = [part for edit in (self, other) for part in edit.parts]
        origin = joined_origin(self.origin, other.origin)
        return Edit(deltas, base, {"method": "sum", "parts": parts}, keys, origin)

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
        tensors |= {f"{name}.keys": keys for name, keys in self.keys.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        base = {name: dict(hashes) for name, hashes in self.base.items()}
        rest = json.dumps({"base": base, "metadata": self.metadata})
        return write_atomically(path, save(tensors, {"Edit": rest}))

    @classmethod
    def load(cls, path: str | Path, model: HookedMultimodalTransformer | None = None) -> Edit:
        """Read what `save` wrote.

        Args:
            model: the model that it is meant for, to be told at once if it is another one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else, an edit that is not finite, or one of another
                model; the message has the path.
        """
        rest, tensors = read_tensors(path, "Edit")
        edit = cls(*edit_from(rest, tensors, path))
        if model is not None:
            edit.check_weights(model)
        return edit


def edit_from(
    rest: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, Delta], Mapping[str, Mapping[str, str]], dict[str, Any], dict[str, Tensor]]:
    """The fields of an edit, from what is in its file.

    Raises:
        ValueError: they are not those of an edit; the message has the path.
    """
    base: Any = rest.get("base")
    metadata: Any = rest.get("metadata")
    if len(rest) != 2 or not (matches(base, Hashes) and isinstance(metadata, dict)):
        raise ValueError(f"{path} holds no Edit: its fields are not base and metadata")
    left = dict(tensors)
    deltas: dict[str, Delta] = {}
    for name, hashes in base.items():
        if not hashes or not all(hasattr(torch, dtype) for dtype in hashes):
            raise ValueError(f"{path} holds no Edit: {name} has no hash of a dtype")
        if f"{name}.dense" in left:
            deltas[name] = left.pop(f"{name}.dense")
        else:
            factors = [left.pop(f"{name}.{side}", torch.zeros(0)) for side in ("left", "right")]
            if any(each.ndim != 2 for each in factors) or factors[0].shape[1] != len(factors[1]):
                raise ValueError(f"{path} holds no Edit: {name} has no factors that fit")
            deltas[name] = LowRank(*factors)
        if not delta_is_finite(deltas[name]):
            raise ValueError(f"{path}: the edit of {name} is not finite, and cannot be applied")
    keys = {name: left.pop(f"{name}.keys") for name in base if f"{name}.keys" in left}
    for name, each in keys.items():
        if each.ndim != 2 or len(each) != deltas[name].shape[1] or not bool(each.isfinite().all()):
            raise ValueError(f"{path} holds no Edit: the keys of {name} do not fit the weight")
    if left:
        raise ValueError(f"{path} holds no Edit: {', '.join(sorted(left))} belong to no weight")
    return deltas, base, metadata, keys
