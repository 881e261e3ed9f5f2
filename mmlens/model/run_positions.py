"""Which positions of the text a forward pass computes, for whoever calls a hook function.

A pass with a key-value cache computes only the positions after those that the cache holds, and the
text may go on in later passes. Interventions and hook functions mean positions of the whole text.
So the model notes here what its pass computes (`computing`), in a context variable: every thread
has its own. `Intervention` and `HookPoint` read it (`current_pass`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mmlens.utils.temporary import Changes, temporary

Positions = Int[Tensor, " n"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class PassPositions:
    """The positions that a forward pass computes: those from `first` on."""

    first: int = 0
    total: float = 0
    """How many positions the text has once later passes have added theirs: infinity where nobody
    knows, 0 where no pass follows."""
    prompt: int | None = None
    """How many positions the prompt has, where a text is generated; None where none is."""

    @property
    def is_whole(self) -> bool:
        """Whether the pass computes the whole text, and none follows."""
        return not self.first and not self.total

    def positions(self, n: int) -> Positions | None:
        """Return the `n` positions of this pass; None where they are the whole text."""
        if self.is_whole:
            return None
        return torch.arange(self.first, self.first + n)

    def end(self, n: int) -> float:
        """Return the number of positions that the text has, or will have."""
        return max(self.first + n, self.total)


WHOLE = PassPositions()
"""A pass that computes the whole text."""

_current: ContextVar[PassPositions] = ContextVar("current_pass", default=WHOLE)


def current_pass() -> PassPositions:
    """Return what the forward pass that is running computes."""
    return _current.get()


@temporary
def computing(first: int = 0, total: float = 0, prompt: int | None = None) -> Changes[None]:
    """Note that what runs inside computes the positions from `first` on; see `PassPositions`."""
    yield functools.partial(_current.set, _current.get())
    _current.set(PassPositions(first, total, prompt))


def takes_positions(function: Any) -> bool:
    """Return whether a hook function has a parameter `positions`."""
    code = getattr(function, "__code__", None)
    if code is not None and not hasattr(function, "__wrapped__"):
        # The common case without `inspect`, which takes as long as an edit.
        return "positions" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return "positions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins have no signature
        return False


def told_positions(function: F) -> F:
    """Return a hook function that is told its positions, if it has a parameter for them.

    A function whose own `positions` are filled already, by a default or by `functools.partial`,
    is returned as it is.
    """
    if not takes_positions(function):
        return function
    default = inspect.signature(function).parameters["positions"].default
    if default is not None and default is not inspect.Parameter.empty:
        return function

    @functools.wraps(function)
    def told(activation: Tensor, hook: Any) -> Any:
        n = activation.shape[hook.site.position_axis]
        return function(activation, hook=hook, positions=current_pass().positions(n))

    return told  # type: ignore[return-value]
