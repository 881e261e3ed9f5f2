"""What is swept over: questions, or edits with all the questions that are asked about them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mmlens.data import EditCase, VisualQuestion
from mmlens.images import load_image

__all__ = ["Item", "content", "image_name", "question_of", "with_absolute_paths"]

Item = VisualQuestion | EditCase
COMPARED = [each.name for each in fields(VisualQuestion) if each.name not in ("image", "extra")]


def question_of(item: Item) -> VisualQuestion:
    """The question itself, or the one whose answer is edited."""
    return item.question if isinstance(item, EditCase) else item


def content(item: Item) -> Any:
    """Everything about an item as JSON holds it: words, answers, names of pictures.

    What is in a file does not count: a picture that was missing may be put there later.
    """
    if not isinstance(item, EditCase):
        return [[getattr(item, name) for name in COMPARED], [image_name(x) for x in item.images]]
    groups = {**item.groups(), "for the method": (*item.key_questions, *item.kept)}
    asked = {name: [content(each) for each in group] for name, group in groups.items()}
    return [content(item.question), item.target, asked]


def image_name(image: Any) -> str:
    """The last two parts of a path, so that a data set may move; for a picture in memory a hash."""
    if isinstance(image, str | PathLike):
        return "/".join(Path(image).parts[-2:])
    try:
        opened = load_image(image)
    except (ValueError, TypeError, OSError):
        return "unreadable picture"
    pixels = f"{opened.size}".encode() + opened.tobytes()
    return f"sha256:{hashlib.sha256(pixels).hexdigest()[:16]}"


def with_absolute_paths(item: Item) -> Item:
    """The same, whatever the working directory is: workers may have another one."""
    return each_question(item, lambda question: replace(question, image=absolute(question.image)))


def absolute(image: Any) -> Any:
    """A path as an absolute one, also in a tuple; other pictures as they are."""
    if isinstance(image, tuple | list):
        return tuple(map(absolute, image))
    return Path(image).absolute() if isinstance(image, str | PathLike) else image


def each_question(item: Item, change: Callable[[VisualQuestion], VisualQuestion]) -> Item:
    """An item with all of its questions changed."""
    if not isinstance(item, EditCase):
        return change(item)

    def changed(questions: tuple[VisualQuestion, ...]) -> tuple[VisualQuestion, ...]:
        return tuple(map(change, questions))

    return replace(
        item,
        question=change(item.question),
        paraphrases=changed(item.paraphrases),
        other_images=changed(item.other_images),
        neighbours={name: changed(group) for name, group in item.neighbours.items()},
        portability=changed(item.portability),
        key_questions=changed(item.key_questions),
        kept=changed(item.kept),
    )
