"""Which edits a model has now, and the weights that they found.

An edit is noted here, with the weights that it is about to change, before it changes the first of
them, and until the last is as it was. So whatever interrupts it, the weights can be put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import Tensor

from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.temporary import Changes, temporary

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


@runtime_checkable
class WeightEdit(Protocol):
    """What an `Edit` is here: it touches weights, and knows how it was made."""

    @property
    def deltas(self) -> Mapping[str, Any]:
        """By the names of the weights."""

    @property
    def parts(self) -> list[dict[str, Any]]:
        """How each edit in it was made."""

    def apply(self, model: HookedMultimodalTransformer, /) -> None:
        """Change the weights."""

    def check_is_off(self, model: HookedMultimodalTransformer, /) -> None:
        """Raise a ValueError where the model has it."""


@dataclass(frozen=True, eq=False)
class Applied:
    """An edit that a model has."""

    edit: WeightEdit
    originals: Mapping[str, Tensor]
    """The weights that it touches, as it found them."""

    @without_gradients
    def put_back(self, model: HookedMultimodalTransformer) -> None:
        """Give the model these weights again."""
        for name, original in self.originals.items():
            weight_of(model, name).copy_(original)


_applied: WeakKeyDictionary[Any, list[Applied]] = WeakKeyDictionary()


def applied_to(model: HookedMultimodalTransformer) -> list[Applied]:
    """The model's edits, in the order in which they were applied; to be added to."""
    return _applied.setdefault(model, [])


def resting_on(model: HookedMultimodalTransformer, edit: WeightEdit) -> list[Applied]:
    """An edit, if the model has it, and the later ones that touch the same weights."""
    found: list[Applied] = []
    touched: set[str] = set()
    for each in applied_to(model):
        if each.edit is edit or touched & each.edit.deltas.keys():
            found.append(each)
            touched |= each.edit.deltas.keys()
    return found


def take_off(model: HookedMultimodalTransformer, edit: WeightEdit) -> None:
    """Put the weights back, if the model has the edit; what was interrupted can be done again.

    Raises:
        ValueError: later edits of the same weights were still on; they have been taken off as well.
    """
    found = resting_on(model, edit)
    for each in reversed(found):
        each.put_back(model)
        applied_to(model).remove(each)
    if len(found) > 1:
        names = ", ".join(edit_in_words(each.edit) for each in found[1:])
        raise ValueError(
            f"edits of the same weights ({names}), which had been applied later, were still on "
            f"when this one ({edit_in_words(edit)}) was taken off: they are off now as well"
        )


@temporary
def applied_in_turn(model: HookedMultimodalTransformer) -> Changes[Callable[[WeightEdit], None]]:
    """A block for edits that are each made on the model that has the earlier ones.

    Yields the function that applies one; after the block all are off.

    Example:
        >>> with applied_in_turn(model) as apply:
        ...     for request in requests:
        ...         apply(rome(model, request, layer=3, covariance=covariance))
    """
    begun: list[WeightEdit] = []

    def take_off_all() -> None:
        while begun:
            take_off(model, begun[-1])
            begun.pop()

    def apply(edit: WeightEdit) -> None:
        edit.check_is_off(model)
        begun.append(edit)
        edit.apply(model)

    yield model.exclusive()
    yield take_off_all
    return apply


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
    for each in applied_to(model):
        if name in each.originals:
            return each.originals[name]
    return weight_of(model, name)


def edit_in_words(edit: WeightEdit) -> str:
    """An edit in a few words, for error messages."""
    parts = edit.parts
    first = f"{parts[0].get('method', 'edit')} to {parts[0].get('target', '?')!r}"
    return first if len(parts) == 1 else f"{first} and {len(parts) - 1} more"
