"""Interrupt a function at every line that it executes in some modules, one run for each.

    for stop in every_line(lambda: model(inputs), hooked_root_module, temporary):
        ...  # it was interrupted at stop.line; stop.error is still held, as notebooks hold it

Signals come between any two bytecodes, and errors come from anywhere: `sys.settrace` raises one
before each line in turn.
"""

from __future__ import annotations

import random
import signal
import sys
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

CHECKED_CALLS = 5
"""Of each function in each test, as in conftest.py."""


@dataclass(frozen=True)
class Stop:
    """A run that was interrupted."""

    line: str
    """Function and line number."""
    error: BaseException
    """What was raised; it holds the frames, and what is in them."""


class Ticker:
    """Counts the lines executed in some files, and raises before some of them."""

    def __init__(
        self, modules: Collection[ModuleType], error: type[BaseException], at: Collection[int]
    ) -> None:
        self.files = {str(module.__file__) for module in modules}
        self.error, self.at = error, frozenset(at)
        self.count = 0
        self.lines: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.files or is_of_type_check(frame):
            return None
        if event == "line":
            self.count += 1
            if self.count in self.at:
                self.lines.append(f"{frame.f_code.co_qualname}, line {frame.f_lineno}")
                raise self.error(f"at {self.lines[-1]}")
        return self

    def run(self, body: Callable[[], Any]) -> Stop | None:
        """Run `body`; where it was stopped, if it was."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            body()
        except self.error as error:
            return Stop("; ".join(self.lines), error)
        finally:
            sys.settrace(before)
        assert not self.lines, f"stopped at {self.lines}, but nothing came out of it"
        return None


def is_of_type_check(frame: FrameType | None) -> bool:
    """Whether this is a property that a check against a protocol evaluates, in tests alone.

    An error in it would be taken for an argument of the wrong type.
    """
    while frame is not None and frame.f_code.co_filename != typing.__file__:
        frame = frame.f_back
    return frame is not None


def every_line(
    body: Callable[[], Any],
    *modules: ModuleType,
    error: type[BaseException] = KeyboardInterrupt,
    most: int | None = None,
    twice: bool = False,
) -> Iterator[Stop]:
    """Run `body` again and again, each time stopped at another line of the modules.

    Args:
        body: leaves everything as it found it, when nothing stops it.
        modules: in whose files lines are counted.
        error: what is raised.
        most: of more lines than this, so many are drawn.
        twice: raise again, at one of the next lines: Ctrl-C while Python cleans up.
    """
    for _ in range(CHECKED_CALLS):  # what is done only at first is not counted: checks of types
        body()
    whole = Ticker(modules, error, ())
    assert whole.run(body) is None
    assert whole.count, "the body executes no line of these modules"
    chosen = range(1, whole.count + 1)
    if most is not None and most < whole.count:
        chosen = sorted(random.sample(chosen, most))
    for first in chosen:
        then = {first + random.randint(1, 12)} if twice else set()
        yield stopped(Ticker(modules, error, {first} | then).run(body))


def stopped(stop: Stop | None) -> Stop:
    """The same; it must be one."""
    assert stop is not None, "fewer lines were executed than in the whole run"
    return stop


def interrupted_at_random(body: Callable[[], Any], seconds: float = 0.02) -> bool:
    """Run `body`, with a signal at a random moment that Python takes as it takes Ctrl-C."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, seconds))
        body()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False
