"""Tokens as readable labels."""

from __future__ import annotations


def visible(text: str) -> str:
    """Return the text with line breaks shown, so that a label stays on one line.

    Angle brackets are replaced by ones that plotly does not take for markup.
    """
    for character, shown in (("\n", "↵"), ("\t", "⇥"), ("<", "‹"), (">", "›")):
        text = text.replace(character, shown)
    return text


def shorten(text: str, length: int) -> str:
    """Shorten a text to `length` characters by its middle: labels differ at their ends."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"
