"""Where things are printed: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.text import Text

from mmlens.utils.terminal import SafeConsole, safe_streams

# Made anew for each use: rich binds a console to the stream it finds, and tests exchange them.


def out() -> SafeConsole:
    """The console for results."""
    return SafeConsole()


def err() -> SafeConsole:
    """The console for everything else."""
    return SafeConsole(stderr=True)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """A spinner on stderr while something takes seconds; bars of others are shown beside it."""
    console = err()
    if not console.is_terminal:
        yield
        return
    status = console.status(Text(title))
    with safe_streams(console, lambda bar: status.update(Text(f"{title} {bar}"))), status:
        yield
