"""Tokens as readable labels."""

from __future__ import annotations


def visible(text: str) -> str:
    """Return the text with line breaks shown, so that a label stays on one line.

    Angle brackets are replaced by ones that plotly does not take for markup.
    """
    for character, shown in (("\n", "↵"), ("\t", "⇥"), ("<", "‹"), (">", "›")):
        text = text.replace(character, shown)
    return text


def metric_in_words(metric: str, answer: str, contrast: str = "") -> str:
    """Return what a metric of an answer is, as a title says it."""
    quoted, other = (f"“{visible(each.strip())}”" for each in (answer, contrast))
    words = {
        "probability": f"P({quoted})",
        "logit_diff": f"logit of {quoted} − {other}",
        "kl": "KL divergence of the next token",
        "loss": f"loss of {quoted}",
    }
    return words.get(metric, f"{visible(metric)} of {quoted}")


def shorten(text: str, length: int) -> str:
    """Shorten a text to `length` characters by its middle: labels differ at their ends."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"
