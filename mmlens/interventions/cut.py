"""The slices of activations that interventions edit, of one branch or of several together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlens.interventions.hook_function import takes_branches
from mmlens.model.hook_points import HookPoint, check_replacement
from mmlens.model.run_positions import Positions, takes_positions

if TYPE_CHECKING:
    from mmlens.interventions.intervention import Intervention


@dataclass(frozen=True, eq=False)
class Cut:
    """The slice of an activation that an intervention edits."""

    whole: Tensor
    axis: int
    """Of the positions."""
    at: int | Tensor | None
    """Where the slice begins, or which positions it holds; None where it is everything."""
    slice: Tensor
    positions: Positions | None
    """Those of the text; None where the slice is the whole text."""

    def put(self, edited: Tensor) -> Tensor:
        """Return the activation with another slice in the place of this one."""
        if self.at is None:
            return edited
        if isinstance(self.at, Tensor):
            return self.whole.index_copy(self.axis, self.at, edited)
        result = self.whole.clone()
        result.narrow(self.axis, self.at, self.slice.shape[self.axis]).copy_(edited)
        return result


def called(acting: Sequence[tuple[int, Intervention, Cut]], hook: HookPoint) -> list[Tensor]:
    """Return what one function makes of the slices of some branches, which have one shape.

    Args:
        acting: branches, each with its intervention and slice; several share a `batched` function.
    """
    branches, parts, cuts = zip(*acting, strict=True)
    function: Any = parts[0].hook
    options: dict[str, Any] = {}
    positions = [cut.positions for cut in cuts]
    if takes_branches(function):
        given = torch.stack([cut.slice for cut in cuts])
        options = {"branches": torch.tensor(branches)}
        told = None
        if any(each is not None for each in positions):  # of those that are whole, each position
            axis = cuts[0].axis
            whole = torch.arange(cuts[0].slice.shape[axis])
            told = torch.stack([whole if each is None else each for each in positions])
    else:  # an edit in place must not reach the other units and tiles
        given = cuts[0].slice.clone() if parts[0].is_partial else cuts[0].slice
        told = positions[0]
    if takes_positions(function):
        options["positions"] = told
    edited = function(given, hook=hook, **options)
    edited = given if edited is None else edited
    check_replacement(given, edited, hook.name)
    each = edited if takes_branches(function) else [edited]
    return [
        part.with_units(cut.slice, one, hook)
        for part, cut, one in zip(parts, cuts, each, strict=True)
    ]


def edit_together(
    edits: Sequence[tuple[int, Intervention]],
    activations: Mapping[int, Tensor],
    hook: HookPoint,
    firsts: Sequence[int],
    numbers: Sequence[int],
) -> dict[int, Tensor]:
    """Return the activations of branches with all of their interventions, in their order.

    A function that is `batched` is called once for all branches.

    Args:
        edits: branches, each with one of its interventions at this hook point.
        activations: of every branch.
        firsts: the position at which each branch's activation begins.
        numbers: what a function is told that each branch is called.
    """
    changed = dict(activations)
    queues: dict[int, list[Intervention]] = defaultdict(list)
    for index, part in edits:
        queues[index].append(part)
    for turn in zip_longest(*queues.values()):
        together: dict[Any, list[tuple[int, Intervention, Cut]]] = defaultdict(list)
        for index, part in zip(queues, turn, strict=True):
            cut = None if part is None else part.cut(changed[index], hook, firsts[index])
            if cut is not None:
                alone = None if takes_branches(part.hook) else index
                together[id(part.hook), cut.slice.shape, alone].append((index, part, cut))
        for group in together.values():
            found = called([(numbers[index], part, cut) for index, part, cut in group], hook)
            for (index, _, cut), edited in zip(group, found, strict=True):
                changed[index] = cut.put(edited)
    return changed
