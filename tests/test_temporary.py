"""Changes for the time of a block are undone, whatever happens at whichever line."""

from __future__ import annotations

import gc
import sys
from contextlib import ExitStack

import pytest
from interruptions import every_line

from mmlens.utils import temporary as module
from mmlens.utils.temporary import temporary


class Thing:
    """Two things that are changed for a while, and a third that others change."""

    def __init__(self) -> None:
        self.one = self.two = self.inner = 0

    @property
    def as_before(self) -> bool:
        return (self.one, self.two, self.inner) == (0, 0, 0)


@temporary
def changed_inside(thing):
    yield lambda: setattr(thing, "inner", 0)
    thing.inner = 1
    return "inner"


@temporary
def changed(thing):
    yield lambda: setattr(thing, "one", 0)
    thing.one = 1
    inner = yield changed_inside(thing)
    yield lambda: setattr(thing, "two", 0)
    thing.two = 1
    return inner


def used(thing, error=None):
    with changed(thing) as value:
        assert value == "inner"
        assert (thing.one, thing.two, thing.inner) == (1, 1, 1)
        if error is not None:
            raise error
    assert thing.as_before


def held_in_a_variable(thing):
    manager = changed(thing)
    with manager:
        assert thing.two == 1
        # As a debugger does that shows all attributes.
        assert [getattr(manager, name) for name in dir(manager)]
        assert thing.two == 1


def entered_by_hand(thing):
    manager = changed(thing)
    try:
        assert manager.__enter__() == "inner"
    finally:
        manager.__exit__(None, None, None)


def test_changes_are_there_in_the_block_and_undone_after_it():
    thing = Thing()
    for use in (used, held_in_a_variable, entered_by_hand):
        use(thing)
        assert thing.as_before
    with ExitStack() as stack:
        assert stack.enter_context(changed(thing)) == "inner"
        assert thing.two == 1
    assert thing.as_before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("use", [used, held_in_a_variable])
def test_interrupted_at_every_line(use, error):
    thing = Thing()
    own = sys.modules[__name__]
    lines = set()
    for stop in every_line(lambda: use(thing), module, own, error=error):
        assert thing.as_before, stop.line
        lines.add(stop.line)
    assert any("Temporary._leave" in line for line in lines)
    assert any("undo" in line for line in lines)


def test_interrupted_twice():
    thing = Thing()
    for stop in every_line(lambda: used(thing), module, sys.modules[__name__], twice=True):
        line = stop.line
        del stop  # with the frames: in a few cases only their end undoes the rest
        assert thing.as_before, line


def test_an_error_in_the_block_is_interrupted_while_its_changes_are_undone():
    thing = Thing()

    def fails():
        with pytest.raises(ZeroDivisionError):
            used(thing, ZeroDivisionError())

    for stop in every_line(fails, module):
        assert thing.as_before, stop.line


def test_an_error_in_the_block_is_not_hidden():
    done = []

    @temporary
    def stubborn():
        yield lambda: done.append("first")
        yield lambda: 1 / 0

    with pytest.raises(ZeroDivisionError), stubborn():
        pass
    with pytest.raises(KeyError, match="mine") as caught, stubborn():
        raise KeyError("mine")
    assert any("not undone: division by zero" in note for note in caught.value.__notes__)
    assert done == ["first", "first"]  # what can be undone is


def test_a_change_that_fails_undoes_those_before_it():
    thing = Thing()

    @temporary
    def failing():
        yield changed(thing)
        yield lambda: None
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"), failing():
        raise AssertionError("the block must not begin")
    assert thing.as_before


def test_a_block_that_nobody_ends_is_undone_when_it_is_forgotten():
    thing = Thing()

    def numbers():
        with changed(thing):
            yield 1

    unfinished = numbers()
    next(unfinished)
    assert thing.two == 1
    del unfinished
    gc.collect()
    assert thing.as_before
