"""Terminal output that holds only text, and the colours and bars that rich makes itself.

A question, a file's name, a model's answer or an error of another library may hold escape
sequences (see `mmlens.utils.printable`). `SafeConsole` replaces them in whatever rich renders,
`safe_streams` in what is written to stdout and stderr by other means: `print`, warnings, logging,
progress bars of tqdm, tracebacks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.segment import Segment
from rich.text import Text

from mmlens.utils.printable import printable

MOVES = re.compile(r"\r(?=[^\n]*\Z)|\n*(?:\x1b\[A)*\Z")
"""What tqdm begins a write with, and what it writes to go from one of its bars to another."""


class SafeConsole(Console):
    r"""A console on which no text moves the cursor, changes colours, or turns what is read around.

    Example:
        >>> SafeConsole().print("[bold]an answer:[/] \x1b[2J")
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text of which the width is known: escape sequences would have none."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is printed; `control` is what rich writes to move the cursor, say."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class SafeStream(FileProxy):
    """A stream to which only printable text is written; consoles of rich write past it.

    It is a proxy as rich's own, for which rich's live displays leave it where it is.

    Args:
        stream: where everything is written to in the end.
        console: what has a live display, above which whole lines are shown.
        unfinished: gets what is no whole line, such as a bar of tqdm, where there is a console.
    """

    def __init__(
        self,
        stream: Any,
        console: Console | None = None,
        unfinished: Callable[[str], object] | None = None,
    ) -> None:
        self.stream, self.above, self.unfinished = stream, console, unfinished
        self.rest = ""
        super().__init__(console or SafeConsole(), stream)

    def write(self, text: str) -> int:
        """Write a text with every control character replaced."""
        moves = MOVES.match(text)
        begin = moves[0] if moves else ""
        safe = begin + printable(text[len(begin) :])
        if self.above is None:
            self.stream.write(safe)
            return len(text)
        *lines, rest = (self.rest + safe).split("\n")
        self.rest = rest.rpartition("\r")[2].removeprefix("\x1b[A")
        for line in lines:
            self.above.print(Text(line.rpartition("\r")[2]), soft_wrap=True)
        if self.unfinished is not None:
            self.unfinished(self.rest.strip())
        return len(text)

    def flush(self) -> None:
        """Flush the stream; an unfinished line is not written by that."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()

    @property
    def encoding(self) -> str | None:  # type: ignore[override]
        """That of the stream."""
        return self.stream.encoding


@contextmanager
def safe_streams(
    console: Console | None = None, unfinished: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Let only printable text through to stdout and stderr in the block; see `SafeStream`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = [
        SafeStream(getattr(each, "rich_proxied_file", each), console, unfinished) for each in before
    ]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for each in streams:
            if each.rest.strip():
                each.stream.write(f"{each.rest}\n")


def say(text: str) -> None:
    """Print a remark of mmlens on stderr, in a run of any program."""
    print(printable(f"mmlens: {text}"), file=sys.stderr)
