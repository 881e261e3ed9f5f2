"""A question about an image, with the words that constrain its answer."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.data.metrics import is_mark, is_right, letter, parse_choice
from mmlens.data.regions import Region

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEMONSTRATIVE = re.compile(r"\b(this|these|that|those)\s+[\w'-]+", re.IGNORECASE)


@dataclass(frozen=True)
class VisualQuestion:
    """One question about one image (or several), in the form of VQA-Constraints.

    Example:
        >>> inputs = model.prepare(question.prompt(), question.open_images(),
        ...                        spans=question.spans())
    """

    question: str
    image: Any  #: a path or a PIL image; a tuple of them where there are several; None for none
    visual_constraint: str = ""  #: the words that stand for what is in the image: "this country"
    text_constraints: tuple[str, ...] = ()  #: further words that narrow the answer: "north"
    answers: tuple[str, ...] = ()  #: every accepted answer, the usual one first
    options: tuple[str, ...] = ()  #: of a multiple choice question, in order; `answers` are of them
    choice: str = ""  #: the right option's letter, where several read the same: "<image>"
    subject: str = ""  #: what the image shows: "France"
    relation: str = ""
    split: str = ""
    source: str = ""  #: data set and row: "demo/FR/capital"
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    regions: tuple[Region, ...] = ()  #: boxes of the image, of objects that the question is about

    @property
    def images(self) -> tuple[Any, ...]:
        """The images as they are given, unopened."""
        if self.image is None:
            return ()
        return tuple(self.image) if isinstance(self.image, tuple | list) else (self.image,)

    def image_keys(self) -> tuple[str, ...]:
        """What tells the images apart, see `mmlens.inputs.images.image_key`."""
        from mmlens.inputs.images import image_key

        return tuple(map(image_key, self.images))

    def open_images(self) -> list[Image]:
        """Open the images as PIL images in RGB, in the order of the question's `<image>`.

        Raises:
            ValueError: a file is missing or no image.
        """
        from mmlens.inputs.images import load_image

        return [load_image(image) for image in self.images]

    def open_image(self) -> Image:
        """Open the only image, as a PIL image in RGB.

        Raises:
            ValueError: there are several, or none; or the file is missing or no image.
        """
        opened = self.open_images()
        if len(opened) != 1:
            raise ValueError(f"{self.source}: {len(opened)} images; open_images opens them all")
        return opened[0]

    def prompt(self) -> str:
        """Return the question, followed by its options with their letters and an instruction.

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
        """Return the characters of the constraints in the question, for `model.prepare`.

        `constraint` is the visual one; the text constraints are `text_constraint`,
        `text_constraint_1`, ... Punctuation at the ends of a phrase ("this place,") belongs to no
        span.

        Raises:
            SpanNotFoundError: (a ValueError) a constraint that is not in the question.
        """
        from mmlens.inputs.spans import find_span

        phrases = {"constraint": self.visual_constraint} if self.visual_constraint else {}
        for index, words in enumerate(self.text_constraints):
            phrases[f"text_constraint_{index}" if index else "text_constraint"] = words
        found = {name: find_span(self.question, phrase) for name, phrase in phrases.items()}
        return {name: _trimmed(self.question, *span) for name, span in found.items()}

    def named(self) -> VisualQuestion:
        """Return the question in words alone: the subject replaces the visual constraint, no image.

        Raises:
            SpanNotFoundError: (a ValueError) the constraint is not in the question.
            ValueError: the question has no visual constraint or no subject.

        Example:
            >>> question.question, question.named().question
            ('This country is a part of', 'France is a part of')
        """
        from mmlens.inputs.spans import find_span

        if not self.visual_constraint or not self.subject:
            raise ValueError(f"{self.source}: needs a visual constraint and a subject to name it")
        start, end = _trimmed(self.question, *find_span(self.question, self.visual_constraint))
        name = self.subject
        if self.question[start].isupper():
            name = name[0].upper() + name[1:]
        text = self.question[:start] + name + self.question[end:]
        return replace(self, question=text, image=None, visual_constraint=name)

    def is_right(self, continuation: str) -> bool:
        """Return whether a continuation begins with an accepted answer, or takes the right option.

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
    """Cut what is no letter (with its signs) and no digit off a span's ends, unless all is so."""
    inside = [at for at in range(start, end) if text[at].isalnum() or is_mark(text[at])]
    return (inside[0], inside[-1] + 1) if inside else (start, end)


def demonstrative(text: str) -> str:
    """Return the first "this ..." or "that ..." of a text, which may refer to the image; or ""."""
    found = DEMONSTRATIVE.search(text)
    return found[0] if found else ""


def choose_image(candidates: Sequence[str], seed: int, source: str) -> tuple[str, dict[str, Any]]:
    """Choose one of several suitable images, the same for the same seed and source.

    Returns the choice, and the record of it for `VisualQuestion.extra`.
    """
    chosen = random.Random(f"{seed} {source}").choice(candidates)
    return chosen, {"image_choice": {"of": len(candidates), "seed": seed, "chosen": chosen}}


def images_in(folder: Path) -> list[str]:
    """Return the names of a folder's images, in a fixed order; none if there is no such folder."""
    try:
        return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in IMAGES)
    except (OSError, ValueError):  # no folder, or a name that no file can have
        return []
