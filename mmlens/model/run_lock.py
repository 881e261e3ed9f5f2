"""One run of a model at a time, from any number of threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mmlens.utils.temporary import Changes, temporary

PATIENCE = 30.0
"""Seconds that a thread waits for a block in which nothing runs."""
INTERVAL = 0.1
"""Seconds after which a thread that waits looks again, should nobody have called it."""


class ModelInUse(RuntimeError):
    """Another thread keeps the model in a `with` block, and does not run it."""


@dataclass(eq=False)
class Use:
    """A run or a block for which one thread has the model, or waits for it."""

    is_run: bool
    thread: threading.Thread = field(default_factory=threading.current_thread)
    called: Any = field(default_factory=threading.Lock)
    """Released when it may be this use's turn."""


class RunLock:
    """A lock for what shares hook points: a model, its vision tower, and shallow copies of both.

    A thread that has it may take it again. Others come in the order in which they asked. A block
    may end in another thread than it began in, as that of a generator may, and what a thread that
    has ended still holds keeps nobody waiting.

    A copy of a model (`copy.deepcopy`, `pickle`, `torch.save`) gets a lock of its own.
    """

    def __init__(self) -> None:
        self.levels: set[int] = set()
        """Of the `hooks()` contexts that are open: 1 is the outermost."""
        # Re-entrant, since a block that was forgotten may be ended at any moment, even here. Held
        # for moments only, and by C code that no signal divides.
        self._mutex = threading.RLock()
        self._inside: list[Use] = []
        self._waiting: list[Use] = []
        self._uses = 0
        """So far."""

    @temporary
    def held(self, is_run: bool) -> Changes[None]:
        """Have the lock for the time of a `with` block.

        Where all of the block is work (`is_run`), others wait for it however long it takes; else
        they get a `ModelInUse` error after half a minute without a run.
        """
        use = Use(is_run)
        yield partial(self._give_back, use)
        with self._mutex:
            self._waiting.append(use)
        since, uses = time.monotonic(), self._uses
        while not self._goes_in(use):
            use.called.acquire(timeout=INTERVAL)
            now = time.monotonic()
            if self._uses != uses or any(each.is_run for each in alive(self._inside)):
                since, uses = now, self._uses
            elif now - since > PATIENCE:
                raise ModelInUse(self._why())

    def _goes_in(self, use: Use) -> bool:
        """Let a use in if it is its turn, or its thread is inside already."""
        with self._mutex:
            inside = alive(self._inside)
            mine = any(each.thread is use.thread for each in inside)
            if mine or (not inside and alive(self._waiting)[0] is use):
                self._inside.append(use)
                self._waiting.remove(use)
                self._uses += 1
                return True
        return False

    def _give_back(self, use: Use) -> None:
        """Let the next one in. What was interrupted can be done again."""
        with self._mutex:
            for uses in (self._inside, self._waiting):
                if use in uses:
                    uses.remove(use)
            if not alive(self._inside):
                for following in alive(self._waiting)[:1]:
                    if following.called.locked():
                        following.called.release()

    def _why(self) -> str:
        names = sorted({each.thread.name for each in alive(self._inside)})
        return (
            f"thread {threading.current_thread().name} has waited {PATIENCE:.0f} s for a model "
            f"that thread {', '.join(names)} keeps in a `with` block (hooks, an edit, exclusive) "
            "without running it. A model is used by one thread at a time: end the block, or run "
            "the model in the thread of the block"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RunLock:
        return RunLock()

    def __reduce__(self) -> tuple[type[RunLock], tuple[()]]:
        return RunLock, ()


def alive(uses: list[Use]) -> list[Use]:
    """Those whose thread has not ended.

    A signal in the middle of `Thread.is_alive` can make Python 3.11 take a thread for ended.
    """
    threads = {threading.current_thread(), *threading.enumerate()} if uses else set()
    return [use for use in uses if use.thread in threads]
