"""`Region`: a named box of a question's image, such as an object that the question is about.

for region in question.regions:
positions = inputs.patches(region.box)      # the visual tokens that show it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmlens.data.reading import RowError, expect, shown
from mmlens.inputs.image_tokens import Box


@dataclass(frozen=True)
class Region:
    """A box of an image, and what it shows."""

    name: str
    """Of the object: "wall"."""
    box: Box
    """(left, top, right, bottom), in pixels of the image as it is given to `model.prepare`."""
    named_in: str = ""
    """Where the data set names the object: "question", "answer", "fullAnswer" or "semantic"."""


def box_of(values: Any, name: str = "box") -> Box:
    """Return four numbers as a box.

    Raises:
        RowError: they are no four numbers, or the box is empty.
    """
    numbers = isinstance(values, list | tuple) and all(
        isinstance(each, int | float) and not isinstance(each, bool) for each in values
    )
    if not numbers or len(values) != 4:
        raise RowError(f"{name} must be [left, top, right, bottom] in pixels, not {shown(values)}")
    box = Box(*map(float, values))
    if not (box.left < box.right and box.top < box.bottom):  # neither holds for NaN
        raise RowError(f"{name} {list(values)} (left, top, right, bottom) is empty")
    return box


def read_regions(values: list[Any]) -> tuple[Region, ...]:
    """Return the regions that a row of your own lists as `{"name": ..., "box": [...]}`.

    Raises:
        RowError: one of them lacks a name or a box, or has a box of another kind.
    """
    return tuple(
        Region(
            name=expect(each, "name", "a text"),
            box=box_of(each.get("box")),
            named_in=expect({"named_in": "", **each}, "named_in", "a text"),
        )
        for each in values
    )
