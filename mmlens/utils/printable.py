"""Texts of others, made safe for a terminal and a log.

A question, a model's name or an answer may hold escape sequences, which move the cursor or change
the clipboard, and characters that reverse what is read. `printable` shows them instead.
"""

from __future__ import annotations

import re

UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but for tab and line feed
    "\u2028\u2029"  # line and paragraph separators
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # which way the text goes
    "\ud800-\udfff"  # halves of characters, which no encoding has
    "]"
)
C0_PICTURES = 0x2400
"""Unicode has an image of each of the first control characters, in their order."""


def printable(text: str) -> str:
    r"""Return the text with every control character replaced by one that shows it.

    Tabs and line feeds stay.

    Example:
        >>> printable("\x1b[31mred\x1b[0m")
        '␛[31mred␛[0m'
    """
    return UNSAFE.sub(stand_in, text)


def stand_in(found: re.Match[str]) -> str:
    """Return the image of a control character, or the replacement character."""
    code = ord(found[0])
    if code == 0x7F:
        return "␡"
    return chr(C0_PICTURES + code) if code < 0x20 else "\ufffd"
