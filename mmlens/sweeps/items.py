"""What is swept over: questions, pairs of images, or edits with all that is asked about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mmlens.data import EditCase, ImagePair, VisualQuestion
from mmlens.data.reading import Refused, shown
from mmlens.inputs.images import image_key

Item = VisualQuestion | ImagePair | EditCase
COMPARED = [
    each.name for each in fields(VisualQuestion) if each.name not in ("image", "extra", "regions")
]


def question_of(item: Item | Refused) -> VisualQuestion:
    """The question itself, a pair's clean one, or the one whose answer is edited.

    Of a refused row there is only its source.
    """
    if isinstance(item, Refused):
        return VisualQuestion("", None, source=item.source)
    if isinstance(item, ImagePair):
        return item.clean
    return item.question if isinstance(item, EditCase) else item


def content(item: Item | Refused) -> Any:
    """Everything about an item as JSON holds it: words, answers, names of images.

    What is in a file does not count: an image that was missing may be put there later.
    """
    if isinstance(item, Refused):
        return ["refused", item.why]
    if isinstance(item, ImagePair):
        return [content(question) for question in item.questions]
    if not isinstance(item, EditCase):
        regions = [repr(item.regions)] if item.regions else []
        words = [getattr(item, name) for name in COMPARED]
        objects = [list(item.extra["objects"])] if "objects" in item.extra else []
        return [words, [image_name(x) for x in item.images], *regions, *objects]
    groups = {**item.groups(), "for the method": (*item.key_questions, *item.kept)}
    asked = {name: [content(each) for each in group] for name, group in groups.items()}
    return [content(item.question), item.target, asked]


def image_name(image: Any) -> str:
    """The last two parts of a path, so that a data set may move; for an image in memory a hash."""
    if isinstance(image, str | PathLike):
        return "/".join(Path(image).parts[-2:])
    return image_key(image)


def with_absolute_paths(about: Any) -> Any:
    """The same item, whatever the working directory is: workers may have another one."""
    if isinstance(about, VisualQuestion):
        return replace(about, image=absolute(about.image))
    if isinstance(about, EditCase | ImagePair):
        parts = {each.name: getattr(about, each.name) for each in fields(about)}
        return replace(about, **with_absolute_paths(parts))
    if isinstance(about, Mapping):
        return {name: with_absolute_paths(each) for name, each in about.items()}
    return tuple(map(with_absolute_paths, about)) if isinstance(about, tuple | list) else about


def absolute(image: Any) -> Any:
    """A path as an absolute one, also in a tuple; other images as they are."""
    if isinstance(image, tuple | list):
        return tuple(map(absolute, image))
    return Path(image).absolute() if isinstance(image, str | PathLike) else image


def rows_of(items: Sequence[Item]) -> list[int | Refused]:
    """Return the indices of all items in the order of their data set, and its refused rows."""
    numbers = getattr(items, "numbers", range(len(items)))
    there: list[tuple[int, int | Refused]] = list(zip(numbers, range(len(items)), strict=True))
    there += [(each.row, each) for each in getattr(items, "refused", ())]
    return [each for _, each in sorted(there, key=lambda pair: pair[0])]


def item_at(items: Sequence[Any], index: int) -> Item | Refused:
    """Return an item, or why there is none: a reader of the user's own may fail at any row."""
    try:
        item = items[index]
    except Exception as error:  # whatever it is, the other rows go on
        return Refused(index, f"row {index}", f"{type(error).__name__}: {error}")
    if not isinstance(item, Item):
        why = f"must be a question, a pair of images or an edit, not {shown(item)}"
        return Refused(index, f"row {index}", why)
    return item
