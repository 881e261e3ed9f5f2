"""Nothing but text, and what rich and tqdm write themselves, reaches a terminal."""

from __future__ import annotations

import io
import logging
import random
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from mmlens.cli.console import waiting
from mmlens.utils.progress import progress_bar
from mmlens.utils.terminal import SafeConsole, safe_streams, say

MARK = "\x1b[5;35m\x1b]0;t\x07\x9b2J\x1b[2J\x1bc\u202e\x7f\x08\rEVIL"
"""Blinking colours, a title, an empty screen, a reset, text that runs backwards, a new begin."""
OWN = re.compile(r"\x1b\[(?:[\d;]*m|\?25[lh]|2K|1?A)|\r")
"""What rich and tqdm write: colours, a hidden cursor, a line that is written anew."""
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def evil_in(text: str) -> set[str]:
    """Control characters of a text but those that rich and tqdm write, and what marks are made of.

    By Unicode's own tables, not by the library's.
    """
    found = {each for each in ("\x1b[5;35m", "\x1b[2J", "\rEVIL") if each in text}
    return found | {
        each
        for each in OWN.sub("", text)
        if (unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t")
        or unicodedata.bidirectional(each) in BIDI
    }


class Screen(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Screen, Screen]]:
    """Make stdout and stderr terminals with colours, and return what is written there.

    To be called in the test: pytest exchanges the streams before that.
    """

    def begin() -> tuple[Screen, Screen]:
        for name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        screens = Screen(), Screen()
        monkeypatch.setattr(sys, "stdout", screens[0])
        monkeypatch.setattr(sys, "stderr", screens[1])
        return screens

    return begin


def test_every_control_character_of_unicode(terminal):
    screens = terminal()
    every = map(chr, range(sys.maxunicode + 1))
    kinds = unicodedata.category, unicodedata.bidirectional
    controls = [each for each in every if {kind(each) for kind in kinds} & {"Cc", "Cs", *BIDI}]
    controls = [each for each in controls if each not in "\n\t"]
    assert len(controls) == 65 - 2 + 9 + 0x800
    random.shuffle(controls)
    text = "".join(controls) + "\rEVIL"
    SafeConsole().print(text, markup=False)
    with safe_streams():
        print(text)
    say(text)
    for screen in screens:
        assert "EVIL" in screen.getvalue()
        assert not evil_in(screen.getvalue())


@pytest.mark.parametrize(
    "made",
    [
        str,
        Text,
        lambda text: Text("at the end", style="bold").append(text, style="red"),
        lambda text: Panel(text, title=Text(text)),
        lambda text: Text.from_markup(f"[red]{text}[/]"),
    ],
)
def test_whatever_rich_renders(terminal, made):
    screens = terminal()
    table = Table(MARK, MARK, title=MARK)
    table.add_row(made(MARK), Text(MARK))
    console = SafeConsole()
    console.print(table, made(MARK), sep=MARK, end=MARK)
    console.print("[bold red]red[/]")
    shown = screens[0].getvalue()
    assert "EVIL" in shown and not evil_in(shown)
    assert "\x1b[1;31mred" in shown  # rich's own colours stay
    assert not OWN.sub("", shown).count("\x1b")


def test_columns_are_as_wide_as_what_is_shown(terminal):
    screens = terminal()
    table = Table(box=None)
    for text in (MARK, "a" * 10):
        table.add_row(text, "|")
    SafeConsole().print(table)
    lines = OWN.sub("", screens[0].getvalue()).rstrip("\n").split("\n")
    assert len({line.index("|") for line in lines if "|" in line}) == 1


def test_layout_and_words_stay(terminal):
    screens = terminal()
    text = "Ünïcödé 日本 \U0001f600\n\tعربي, עברית :bomb: \u200d"
    with safe_streams():
        print(text)
    SafeConsole().print(text, soft_wrap=True)
    assert screens[0].getvalue().startswith(f"{text}\n")
    assert ":bomb:" in screens[0].getvalue().split("\n\t")[-1]


def use_streams() -> None:
    """Write a mark in every way that does not go through rich."""
    print(MARK)
    sys.stderr.writelines([MARK, "\n"])
    warnings.warn(MARK, stacklevel=2)
    handler = logging.StreamHandler()
    handler.emit(logging.LogRecord("x", logging.ERROR, "x", 1, MARK, None, None))
    sys.excepthook(ValueError, ValueError(MARK), None)
    for _ in tqdm(range(3), MARK, mininterval=0, file=sys.stderr):
        for _ in tqdm(range(2), MARK, mininterval=0, leave=False, file=sys.stderr):
            pass


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("inside", ["nothing", "waiting", "progress_bar"])
def test_what_is_written_without_rich(terminal, monkeypatch, inside):
    screens = terminal()
    # pytest keeps warnings to itself
    monkeypatch.setattr(warnings, "showwarning", lambda *said: sys.stderr.write(f"{said[0]}\n"))
    out, err = screens
    with safe_streams():
        if inside == "nothing":
            use_streams()
        else:
            with {"waiting": waiting, "progress_bar": progress_bar}[inside](f"[/x] {MARK}"):
                use_streams()
        assert sys.stdout.isatty() and sys.stdout.encoding == "utf-8"
    shown = out.getvalue() + err.getvalue()
    assert not evil_in(shown)
    assert shown.count("EVIL") >= 5 and "ValueError" in shown and "3/3" in shown
    assert (sys.stdout, sys.stderr) == screens
    if inside == "nothing":
        assert "\r" in err.getvalue() and "\x1b[A" in err.getvalue()  # bars stay bars
    else:
        assert "[/x]" in err.getvalue()  # a title is no markup


def test_streams_come_back_after_an_error(terminal):
    screens = terminal()
    with pytest.raises(KeyboardInterrupt), safe_streams():
        raise KeyboardInterrupt
    assert (sys.stdout, sys.stderr) == screens
