"""A question about a picture, with the words that constrain its answer.

Every reader of a data set yields `VisualQuestion`s: an analysis written for one runs on all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["VisualQuestion", "is_right", "normalise_answer"]

#: what a model may say before the answer itself: "the Republic of Senegal" is Senegal
LEADING = re.compile(r"^(the|a|an|city of|country of|republic of|kingdom of|state of)\s+")
#: apostrophes, and the points of "D.C." but not that of "Guinea.A photo"
ABBREVIATION = re.compile(r"['ʻ’]|(?<=\b[a-z])\.")


def normalise_answer(text: str) -> str:
    """Lower case, without accents, punctuation (hyphens stay), quotes and leading articles."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).lower()
    text = " ".join(re.sub(r"[^\w\s-]", " ", ABBREVIATION.sub("", text)).split())
    while (shorter := LEADING.sub("", text)) != text:
        text = shorter
    return text


def is_right(continuation: str, answers: Sequence[str]) -> bool:
    """Whether a model's continuation begins with an accepted answer, as whole words.

    A plural "s" counts as the same word ("Austrians" for "Austrian").
    """
    said = normalise_answer(continuation)
    accepted = filter(None, map(normalise_answer, answers))
    return any(re.match(rf"{re.escape(answer)}s?(?![\w-])", said) for answer in accepted)


@dataclass(frozen=True)
class VisualQuestion:
    """One question about one picture, in the form of VQA-Constraints."""

    question: str
    image: Any  #: a path or a PIL image; `open_image` opens it
    visual_constraint: str  #: the words that stand for what is in the picture: "this country"
    text_constraints: tuple[str, ...] = ()  #: further words that narrow the answer: "north"
    answers: tuple[str, ...] = ()  #: every accepted answer, the usual one first
    subject: str = ""  #: what the picture shows: "France"
    relation: str = ""
    split: str = ""
    source: str = ""  #: data set and row: "demo/FR/capital"
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def open_image(self) -> Any:
        """The picture as a PIL image in RGB."""
        from PIL import Image

        if isinstance(self.image, (str, Path)):
            with Image.open(self.image) as picture:
                return picture.convert("RGB")
        return self.image.convert("RGB")

    def is_right(self, continuation: str) -> bool:
        """Whether a model's continuation of the question begins with an accepted answer."""
        return is_right(continuation, self.answers)
