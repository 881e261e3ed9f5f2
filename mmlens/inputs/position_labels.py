"""Labels of positions: how they are written, and what they tell.

    <img 3,5>         row 3, column 5 of the image
    <img1 0:3,5>      of the row's second image, view 0 (an image with several views)
    <img newline>     a visual token that is no patch, or a separator between two parts of an image
    <img 3-4,5-8>     a rectangle of patches
    <patch 3,5>       the same in the vision tower
    <patch *:3,5>     the same of every tile, where the tower sees several
    <patch 2:3,5>     of tile 2 alone
    <patch1 3,5>      of the second image, where the tower has all patches in one row

Public names: `VisualLabel`, `position_labels`, `region_label`, `visual_label`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mmlens.inputs.image_tokens import ImageTokens

__all__ = ["PAD_LABEL", "VisualLabel", "position_labels", "region_label", "visual_label"]

PAD_LABEL = "<pad>"
# What begins with numbers and a sign between them is a region.
LABEL = re.compile(r"<((?:img|patch)(\d*)) (?:(?:(\d+|\*):)?(\d+),(\d+)|((?!\d+[-,:]|\*:)[^<>]+))>")


class VisualLabel(NamedTuple):
    """What the label of a visual token or a separator tells."""

    stem: str
    """What it begins with: "img", "img1", "patch"."""
    view: int | Literal["*"] | None
    """Of "patch" it is the tile. "*" for all of several; None where there is one, and where the
    position is no patch."""
    row: int
    column: int
    """-1 where the position is no patch."""
    mark: str = ""
    """What it is in that case: "cls", "newline", a separator's text."""

    @property
    def image(self) -> int:
        """Which image of the row."""
        return int(self.stem.removeprefix("img").removeprefix("patch") or 0)


def visual_label(label: str) -> VisualLabel | None:
    """Return what a label tells of a visual token; None for a word.

    Example:
        >>> visual_label("<img 1:3,5>")
        VisualLabel(stem='img', view=1, row=3, column=5, mark='')
    """
    found = LABEL.fullmatch(label)
    if found is None:
        return None
    stem, _, view, row, column, mark = found.groups()
    if mark is not None:
        return VisualLabel(stem, None, -1, -1, mark)
    number: Any = view if view in (None, "*") else int(view)
    return VisualLabel(stem, number, int(row), int(column))


def position_labels(
    texts: Sequence[str], real: Sequence[bool], images: Sequence[ImageTokens]
) -> list[str]:
    """Label the positions of one row: `<img 3,5>` for visual tokens, else the token's text.

    Args:
        texts: of every position.
        real: False at padding.
        images: those of this row.
    """
    visual: dict[int, str] = {}
    for number, image in enumerate(images):
        several = str(number) if len(images) > 1 else ""
        for position in range(image.start, image.start + image.length):
            visual[position] = f"<img{several} {_bare(texts[position])}>"  # a separator
        visual |= image.labels(several)
    return [
        visual.get(position, text.replace("\n", "\\n") if is_real else PAD_LABEL)
        for position, (text, is_real) in enumerate(zip(texts, real, strict=True))
    ]


def _bare(text: str) -> str:
    """Return a separator's text as part of a label, which has angle brackets of its own."""
    return text.replace("\n", "\\n").replace("<", "").replace(">", "").strip() or "separator"


def region_label(labels: Sequence[str]) -> str | None:
    """Return one label for patches of an image; None for anything else, and for a single one.

    Of each view the smallest rectangle that holds its patches is named, `<img 0:3-4,5-8 1:7,9>`;
    where some patches of a rectangle are missing, their number is (`<img 3-4,5-8 (7 of 8)>`).

    Example:
        >>> region_label(["<img 3,5>", "<img 3,6>"])
        '<img 3,5-6>'
    """
    patches = [visual_label(label) for label in labels]
    known = [patch for patch in patches if patch is not None and not patch.mark]
    if len(known) < max(2, len(patches)) or len({patch.stem for patch in known}) > 1:
        return None
    parts = []
    for view in dict.fromkeys(patch.view for patch in known):
        cells = {(patch.row, patch.column) for patch in known if patch.view == view}
        rows, columns = ((min(side), max(side)) for side in zip(*cells, strict=True))
        full = (rows[1] - rows[0] + 1) * (columns[1] - columns[0] + 1)
        name = "" if view is None else f"{view}:"
        some = "" if len(cells) == full else f" ({len(cells)} of {full})"
        parts.append(f"{name}{_range(rows)},{_range(columns)}{some}")
    return f"<{known[0].stem} {' '.join(parts)}>"


def _range(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"
