"""What `mmlens contributions` and `mmlens knockout` share: two spans of a prompt."""

from __future__ import annotations

from mmlens.cli import options
from mmlens.cli.errors import UserError

#: what ``--from`` and ``--to`` may name; anything else is words of the question
NAMES = ("image", "constraint", "question", "last", "text", "bos")


def checked_phrases(
    question: str, source: str, destination: str, constraint: str | None, template: str
) -> dict[str, str]:
    """Return the phrases that have to be found in the prompt, by the name of their span."""
    phrases = {}
    if constraint is not None:
        options.check_phrase(question, constraint, template)
        phrases["constraint"] = constraint
    for option, words in (("--from", source), ("--to", destination)):
        if words == "constraint" and constraint is None:
            raise UserError(f"{option} constraint needs --constraint with the words of it")
        if words not in NAMES:
            options.check_phrase(question, words, template, option)
            phrases[words] = words
    return phrases
