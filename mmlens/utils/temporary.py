"""Changes for the time of a `with` block that nothing survives, not even Ctrl-C at any moment.

    @temporary
    def frozen(model):
        trained = [each for each in model.parameters() if each.requires_grad]
        yield lambda: [each.requires_grad_(True) for each in trained]
        for each in trained:
            each.requires_grad_(False)

    with frozen(model): ...

Every `yield` says how to undo the change that comes after it, before the change is made. At the
end of the block, or when one of the changes fails, everything is undone in the opposite order.

`contextlib.contextmanager` is not enough where a change must not survive. Python looks for signals
between any two calls. A KeyboardInterrupt between a change and the `try` that protects it, in the
middle of a `finally`, or between the end of the block and the first line of `__exit__` leaves the
change, for good or as long as somebody holds the traceback (as a notebook does).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Undo: TypeAlias = Callable[[], object]
"""Undoes a change. It may be called twice, and before the change was complete."""

Changes: TypeAlias = Generator[Any, Any, T]
"""What a temporary function yields: an `Undo`, or another manager made by `temporary`, which is
entered for the rest of the block (the value of the `yield` is that of its `as`). It returns the
value of `as`."""


def temporary(function: Callable[P, Changes[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Make a context manager of a generator that yields how to undo what it does next.

    An error inside the block is never hidden by one of undoing, which becomes a note on it.

    Example:
        >>> @temporary
        ... def level(logger, value):
        ...     yield partial(logger.setLevel, logger.level)
        ...     logger.setLevel(value)
    """

    @wraps(function)
    def manager(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return Temporary(partial(function, *args, **kwargs))

    return manager


class Exit:
    """An `__exit__` that ends the block even where Python is interrupted before it begins.

    A `with` statement looks up `__exit__`, calls `__enter__`, and lets go of what it has looked up
    when it is over, however that happens. So what it gets is an object of its own, whose end undoes
    what the call should have undone.
    """

    def __get__(
        self, manager: Temporary[Any] | None, owner: type[Temporary[Any]]
    ) -> Callable[..., None]:
        if manager is None:  # as `contextlib.ExitStack` looks it up
            return owner._leave
        leave = partial(Temporary._leave, manager)
        manager._held = weakref.ref(leave)
        return leave


class Temporary(AbstractContextManager[T], Generic[T]):
    """The context manager that `temporary` makes; for one block at a time."""

    __exit__ = Exit()
    _held: Callable[[], Any] = staticmethod(lambda: None)
    """The `__exit__` that a `with` statement holds, if there is one."""

    def __init__(self, begin: Callable[[], Changes[T]]) -> None:
        self._begin = begin
        self._steps: list[Undo] = []

    def __enter__(self) -> T:
        self._missed = weakref.finalize(self._held() or self, undo, self._steps)
        try:
            return self._change()
        except BaseException as error:
            try:
                self._end(error)
            finally:
                undo(self._steps)
            raise

    def _change(self) -> T:
        """Run the generator to its end, and keep how to undo what it does."""
        changes, value = self._begin(), None
        while True:
            try:
                step = changes.send(value)
            except StopIteration as end:
                return end.value
            value = None
            if isinstance(step, Temporary):
                self._steps.append(partial(undo, step._steps))
                value = step._change()
            else:
                self._steps.append(step)

    def _leave(self, kind: Any = None, error: BaseException | None = None, _: Any = None) -> None:
        """What `__exit__` does."""
        try:
            self._end(error)
        finally:
            undo(self._steps)

    def _end(self, error: BaseException | None) -> None:
        """Undo everything; a second time what was interrupted or failed."""
        try:
            try:
                undo(self._steps)
            finally:
                undo(self._steps)
        except Exception as failed:
            self._steps.clear()  # nothing more can be done about them
            if error is None:
                raise
            error.add_note(f"What was changed for the time of the block is not undone: {failed}")
        self._missed.detach()


def undo(steps: list[Undo]) -> None:
    """Undo the last change first. A step is kept until it is done; one that fails stays."""
    failed: Exception | None = None
    for step in steps[::-1]:
        try:
            step()
        except Exception as error:
            failed = failed or error
        else:
            steps.remove(step)
    if failed is not None:
        raise failed
