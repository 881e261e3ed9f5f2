"""When two float32 computations are the same: within 1e-4, or within what rounding makes of one.

Activations of the random models are of order 1, and equal ones differ by some 1e-6. But once in
some thousand draws a model amplifies rounding, and then its own reference, rounded otherwise, moves
as far.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
CEILING = 1e-2
"""No rounding excuses more: a wrong bias, mask or head would be off by 0.1."""
DRAWS = 4
"""Of rounding, where the tolerance is not kept; the largest counts."""

Module = TypeVar("Module", bound=nn.Module)
Tensors = Tensor | Mapping[str, Tensor]


def rounded(tensor: Tensor) -> Tensor:
    """By one unit of float32 up, down or not at all."""
    return tensor * (1 + 2**-23 * torch.randint(-1, 2, tensor.shape))


@torch.no_grad()
def rounded_otherwise(model: Module) -> Module:
    """A copy in which every weight, and what every module gives, is rounded by one unit more.

    That is where a pass rounds.
    """
    moved = copy.deepcopy(model)
    for weight in moved.parameters():
        weight.copy_(rounded(weight))
    for module in moved.modules():
        module.register_forward_hook(
            lambda module, inputs, out: rounded(out) if isinstance(out, Tensor) else None
        )
    return moved


def largest(differences: Tensor) -> float:
    """The largest size; infinite where something is no number."""
    return float(differences.detach().abs().max().nan_to_num(nan=torch.inf))


def assert_same(ours: Tensors, theirs: Tensors, again: Callable[[], Tensors]) -> None:
    """Assert that tensors are the same, but for rounding.

    Args:
        ours: one tensor, or several by name.
        theirs: what they must be.
        again: computes `theirs` anew, with a model that is `rounded_otherwise`.
    """
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert_rounding(
        {name: largest(ours[name] - theirs[name]) for name in theirs},
        lambda: {name: largest(tensor - theirs[name]) for name, tensor in named(again()).items()},
    )


def assert_rounding(
    differences: Mapping[str, float], moved: Callable[[], Mapping[str, float]]
) -> None:
    """Assert that differences are within the tolerance, or within 4 x what rounding moves.

    Args:
        differences: by name.
        moved: how far the same moves in the reference when that is `rounded_otherwise`.
    """
    wrong = {name: value for name, value in differences.items() if not value < TOLERANCE}
    if wrong:
        draws = [moved() for _ in range(DRAWS)]
        limits = {name: min(4 * max(draw[name] for draw in draws), CEILING) for name in wrong}
        wrong = {name: value for name, value in wrong.items() if not value < limits[name]}
    assert not wrong


def named(tensors: Tensors) -> Mapping[str, Tensor]:
    """One tensor as several."""
    return {"": tensors} if isinstance(tensors, Tensor) else tensors
