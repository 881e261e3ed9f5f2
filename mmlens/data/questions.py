"""A question about a picture, with the words that constrain its answer; and sets of them.

Every reader of a data set gives a `QuestionSet` of `VisualQuestion`s: an analysis written for one
data set runs on all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from mmlens.data.metrics import is_right, letter, parse_choice

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmlens.data.report import Report

__all__ = ["QuestionSet", "Rows", "VisualQuestion", "choose_image", "demonstrative"]

Row = TypeVar("Row")
Set = TypeVar("Set")

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEMONSTRATIVE = re.compile(r"\b(this|these|that|those)\s+[\w'-]+", re.IGNORECASE)


@dataclass(frozen=True)
class VisualQuestion:
    """One question about one picture (or several), in the form of VQA-Constraints.

    Example:
        >>> inputs = model.prepare(question.prompt(), question.open_images(),
        ...                        spans=question.spans())
    """

    question: str
    image: Any  #: a path or a PIL image; a tuple of them where there are several; None for none
    visual_constraint: str = ""  #: the words that stand for what is in the picture: "this country"
    text_constraints: tuple[str, ...] = ()  #: further words that narrow the answer: "north"
    answers: tuple[str, ...] = ()  #: every accepted answer, the usual one first
    options: tuple[str, ...] = ()  #: of a multiple choice question, in order; `answers` are of them
    choice: str = ""  #: the right option's letter, where several read the same: "<image>"
    subject: str = ""  #: what the picture shows: "France"
    relation: str = ""
    split: str = ""
    source: str = ""  #: data set and row: "demo/FR/capital"
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def images(self) -> tuple[Any, ...]:
        """The pictures as they are given, unopened."""
        if self.image is None:
            return ()
        return tuple(self.image) if isinstance(self.image, tuple | list) else (self.image,)

    def open_images(self) -> list[Image]:
        """The pictures as PIL images in RGB, in the order of the question's `<image>`.

        Raises:
            ValueError: a file is missing or no picture.
        """
        from mmlens.images import load_image

        return [load_image(image) for image in self.images]

    def open_image(self) -> Image:
        """The only picture, as a PIL image in RGB.

        Raises:
            ValueError: there are several, or none; or the file is missing or no picture.
        """
        opened = self.open_images()
        if len(opened) != 1:
            raise ValueError(f"{self.source}: {len(opened)} pictures; open_images opens them all")
        return opened[0]

    def prompt(self) -> str:
        """The question, and below it the options with their letters and what to do with them.

        The wording is that of MMMU's evaluation of LLaVA (MMMU-Benchmark/MMMU).
        """
        if not self.options:
            return self.question
        options = "\n".join(
            f"({letter(index)}) {option}" for index, option in enumerate(self.options)
        )
        order = "Answer with the option's letter from the given choices directly."
        return f"{self.question}\n\n{options}\n\n{order}"

    def spans(self) -> dict[str, tuple[int, int]]:
        """Characters of the constraints in the question, for `model.prepare`.

        `constraint` is the visual one; the text constraints are `text_constraint`,
        `text_constraint_1`, ... Punctuation at the ends of a phrase ("this place,") belongs to no
        span.

        Raises:
            SpanNotFoundError: (a ValueError) a constraint that is not in the question.
        """
        from mmlens.spans import find_span

        phrases = {"constraint": self.visual_constraint} if self.visual_constraint else {}
        for index, words in enumerate(self.text_constraints):
            phrases[f"text_constraint_{index}" if index else "text_constraint"] = words
        found = {name: find_span(self.question, phrase) for name, phrase in phrases.items()}
        return {name: _trimmed(self.question, *span) for name, span in found.items()}

    def named(self) -> VisualQuestion:
        """The same in words alone: the subject where the visual constraint was, and no picture.

        Raises:
            SpanNotFoundError: (a ValueError) the constraint is not in the question.
            ValueError: the question has no visual constraint or no subject.

        Example:
            >>> question.question, question.named().question
            ('This country is a part of', 'France is a part of')
        """
        from mmlens.spans import find_span

        if not self.visual_constraint or not self.subject:
            raise ValueError(f"{self.source}: needs a visual constraint and a subject to name it")
        start, end = _trimmed(self.question, *find_span(self.question, self.visual_constraint))
        name = self.subject
        if self.question[start].isupper():
            name = name[0].upper() + name[1:]
        text = self.question[:start] + name + self.question[end:]
        return replace(self, question=text, image=None, visual_constraint=name)

    def is_right(self, continuation: str) -> bool:
        """Whether a model's continuation begins with an accepted answer, or takes the right option.

        See `mmlens.data.metrics` for other measures.
        """
        if not self.options:
            return is_right(continuation, self.answers)
        chosen = parse_choice(continuation, self.options)
        return chosen is not None and letter(chosen) in self.expected

    @property
    def expected(self) -> tuple[str, ...]:
        """What a model is to say: an accepted answer, or the letter of the right option."""
        if not self.options:
            return self.answers
        if self.choice:
            return (self.choice,)
        options = enumerate(self.options)
        letters = tuple(letter(index) for index, option in options if option in self.answers)
        return letters or self.answers


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without what is no letter and no digit at its ends, unless that is all of it."""
    inside = [at for at in range(start, end) if text[at].isalnum()]
    return (inside[0], inside[-1] + 1) if inside else (start, end)


def demonstrative(text: str) -> str:
    """The first "this ...", "that ..." of a text: words that may point at a picture; or nothing."""
    found = DEMONSTRATIVE.search(text)
    return found[0] if found else ""


class Rows(Sequence[Row]):
    """The rows of a data set, made when they are asked for; pictures stay closed.

    Args:
        name: of the data set.
        n: how many there are.
        make: gives the row of a number, 0 ... n - 1.
    """

    def __init__(self, name: str, n: int, make: Callable[[int], Row]) -> None:
        self.name = name
        self._make = make
        self._rows: Sequence[int] = range(n)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self: Set, index: slice) -> Set: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            part = type(self)(self.name, 0, self._make)
            part._rows = self._rows[index]
            return part
        return self._make(self._rows[index])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} rows)"


class QuestionSet(Rows[VisualQuestion]):
    """The questions of a data set, made when they are asked for.

    Example:
        >>> questions = multimodal_known("multimodal_known.csv", "pictures")
        >>> print(questions.report())
        >>> for question in questions[:100]: ...
    """

    def report(self) -> Report:
        """What is not as it should be: constraints, pictures, answers; see `mmlens.data.report`."""
        from mmlens.data.report import check_questions

        return check_questions(self, self.name)


def choose_image(candidates: Sequence[str], seed: int, source: str) -> tuple[str, dict[str, Any]]:
    """One of several pictures that would do, the same for the same seed and source.

    Returns:
        The choice, and the record of it for `VisualQuestion.extra`.

    Raises:
        IndexError: no candidates.
    """
    chosen = random.Random(f"{seed} {source}").choice(candidates)
    return chosen, {"image_choice": {"of": len(candidates), "seed": seed, "chosen": chosen}}


def pictures_in(folder: Path) -> list[str]:
    """Names of the picture files in a folder, in a fixed order; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICTURES)
