"""Where things are printed: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SILENCE = 60.0
"""Seconds between two lines of progress where no terminal shows a bar: in a log file, say."""

# Made anew for each use: rich binds a console to the stream it finds, and tests exchange them.


def out() -> Console:
    """The console for results."""
    return Console(highlight=False)


def err() -> Console:
    """The console for everything else."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, or a line now and then where that is no terminal.

    Yields the function `(done, total)` that moves it.
    """
    console = err()
    if not console.is_terminal:
        yield progress_lines(title, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_lines(title: str, console: Console) -> Callable[[int, int], None]:
    """What prints how far it is, if it is a while that it did."""
    began = said = time.monotonic()

    def moved(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SILENCE:
            said = now
            console.print(f"{title}: {done} of {total} after {timedelta(seconds=int(now - began))}")

    return moved


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """A spinner on stderr while something takes seconds."""
    with err().status(title):
        yield
