"""`noting_interrupts`: whether Ctrl-C was pressed, whatever became of its KeyboardInterrupt.

An import that is interrupted half way leaves modules half made, and what is raised then may be any
error: a RecursionError in numpy, an ImportError in torch. It is the interruption's all the same.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupts:
    """What is known of interrupts."""

    seen: bool = False


@contextmanager
def noting_interrupts() -> Iterator[Interrupts]:
    """Note a SIGINT, which raises a KeyboardInterrupt as always; other handlers are left alone."""
    found = Interrupts()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield found
        return

    def note(number: int, frame: FrameType | None) -> None:
        found.seen = True
        signal.default_int_handler(number, frame)

    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # signals belong to the main thread
        yield found
        return
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
