"""`noting_interrupts`: Ctrl-C waits for an import's end, and is known of whatever became of it.

An import that is interrupted half way leaves modules half made, and what is raised then may be any
error: a RecursionError in numpy, an ImportError in torch; in C++ code of torch it even aborts the
process. So a first Ctrl-C waits until no import is under way. A second one does not wait, and what
is raised then is the interruption's all the same.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

AGAIN_AFTER = 0.05
"""Seconds after which Ctrl-C is tried again that came during an import."""


@dataclass
class Interrupts:
    """What is known of interrupts."""

    seen: bool = False


@contextmanager
def noting_interrupts() -> Iterator[Interrupts]:
    """Note a SIGINT, which raises a KeyboardInterrupt as always, but not within a first import.

    Other handlers are left alone.
    """
    found = Interrupts()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield found
        return
    tried_again = over = False
    main = threading.get_ident()

    def try_again() -> None:
        nonlocal tried_again
        time.sleep(AGAIN_AFTER)
        tried_again = True
        if not over:
            send_to(main)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal tried_again, over
        first, found.seen = tried_again or not found.seen, True
        if first and is_importing(frame):
            tried_again = False
            # A Timer takes locks of `threading`, which what was interrupted may hold.
            _thread.start_new_thread(try_again, ())
            return
        over = True
        signal.default_int_handler(number, frame)

    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # signals belong to the main thread
        yield found
        return
    try:
        yield found
    finally:
        over = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def send_to(thread: int) -> None:
    """Send a SIGINT to the main thread, which also ends its waiting where signals can do that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, signal.SIGINT)
    else:
        _thread.interrupt_main()


def is_importing(frame: FrameType | None) -> bool:
    """Tell whether a frame runs within an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
