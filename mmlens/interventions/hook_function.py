"""`HookFunction`: what a hook point calls; and what such functions are made of."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.model.hook_points import HookPoint
from mmlens.model.run_positions import Positions
from mmlens.utils.tensors import to_device

Activation = Float[Tensor, "*shape"]


@runtime_checkable
class HookFunction(Protocol):
    """What a hook point calls: returns the activation's replacement, or None to leave it."""

    def __call__(self, activation: Any, /, hook: Any) -> Any:
        """Called as `f(activation, hook=hook_point)`."""


def batched(function: Any) -> HookFunction:
    """Return a hook function that is marked as one that edits all branches at once.

    `Recording.run` calls it once for each hook point of the decoder with the slices of all branches
    that it acts on there (of those that are computed together, and of as many positions): as
    `f(slices, hook=..., branches=...)` with slices [branch, row, pos, ...] and the indices of the
    branches [branch], a LongTensor on the CPU. It returns what takes their place. So one function
    ablates a thousand features, each in its own branch. In any other run there is one branch, 0.

    Example:
        >>> @batched
        ... def without_feature(slices, hook, branches):
        ...     direction = directions[branches][:, None, None]          # [branch, 1, 1, d_model]
        ...     return slices - (slices * direction).sum(-1, keepdim=True) * direction
        >>> edit = Intervention("resid_post", 12, inputs.span("last"), without_feature)
        >>> recording.run([[edit]] * len(directions), readout)
    """
    marked: Any = partial(function)
    marked.takes_branches = True
    return marked


def takes_branches(function: Any) -> bool:
    """Return whether a hook function is `batched`."""
    return getattr(function, "takes_branches", False)


def generator_for(*key: object) -> torch.Generator:
    """A generator whose seed is a hash of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def keep_masked(before: Tensor, after: Tensor, hook: HookPoint) -> Tensor:
    """`after`, with -inf where attention scores were masked: 0 x -inf would be NaN."""
    if hook.site.masked != -torch.inf:
        return after
    return after.masked_fill(before.isneginf(), -torch.inf)


def stretch(positions: Positions) -> tuple[int, int] | None:
    """The first position and their number, where they follow one another; else None."""
    each = positions.tolist()
    if not each or each != list(range(each[0], each[0] + len(each))):
        return None
    return each[0], len(each)


def at_positions(
    activation: Activation, axis: int, positions: Positions
) -> Float[Tensor, "*selected"]:
    """The activation at some positions; a view of it where they follow one another."""
    found = stretch(positions)  # an index would have to be moved to the GPU, for every cell
    if found is not None and sum(found) <= activation.shape[axis]:
        return activation.narrow(axis, *found)
    return activation.index_select(axis, to_device(positions, activation.device))
