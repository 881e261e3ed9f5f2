"""How far something is: what functions that take long call, and a bar that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from mmlens.utils.terminal import SafeConsole, safe_streams

Progress = Callable[[int, int], None]
"""It is called with how much is done, and with how much there is in all."""
SILENCE = 60.0
"""Seconds between two lines of progress where no terminal shows a bar: in a log file, say."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A progress bar on stderr, or a line now and then where that is no terminal.

    Yields the function `(done, total)` that moves it.

    Example:
        >>> with progress_bar("tracing") as moved:
        ...     trace = causal_trace(model, clean, corrupted, progress=moved)
    """
    console = SafeConsole(stderr=True)
    if not console.is_terminal:
        yield progress_lines(title, console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with safe_streams(console), RichProgress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_lines(title: str, console: SafeConsole) -> Progress:
    """Return what prints how far the work is, once in a while."""
    began = said = time.monotonic()

    def moved(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SILENCE:
            said = now
            passed = timedelta(seconds=int(now - began))
            console.print(f"{title}: {done} of {total} after {passed}", markup=False)

    return moved
