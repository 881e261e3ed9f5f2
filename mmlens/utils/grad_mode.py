"""Autograd on or off for the time of a block or a call, whatever interrupts it.

`torch.no_grad` and `torch.enable_grad` are classes in Python. Ctrl-C inside of their `__enter__` or
`__exit__` leaves gradients off for the rest of the session.

A block that was interrupted again and again while it ended is ended when Python forgets it, perhaps
after the block around it. It then changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch

from mmlens.utils.temporary import Changes, temporary

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Block:
    """A block that is open, and whether gradients were on before it."""

    before: bool


class Blocks(threading.local):
    """The blocks that are open in this thread, the outermost first."""

    def __init__(self) -> None:
        self.open: list[Block] = []


blocks = Blocks()


@temporary
def gradients(on: bool) -> Changes[None]:
    """Record gradients, or do not, for the time of a `with` block.

    Example:
        >>> with gradients(False):
        ...     logits = model(inputs)
    """
    block = Block(torch.is_grad_enabled())
    yield partial(end, block)
    blocks.open.append(block)
    torch.set_grad_enabled(on)


def end(block: Block) -> None:
    """Make gradients as they were before a block, and forget the blocks inside of it."""
    if block in blocks.open:
        torch.set_grad_enabled(block.before)
        del blocks.open[blocks.open.index(block) :]


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function that records no gradients while it runs."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with gradients(False):
            return function(*args, **kwargs)

    return call
