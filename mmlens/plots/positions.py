"""Positions as rows of a figure: words one by one, the visual tokens of a picture together.

A picture is 576 positions among two dozen words. Figures show it as one row, which unfolds to the
rows of the picture and to every patch; each of these is a `View` of the same labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mmlens.plots.labels import shorten, visible

Fold = Literal["peak", "sum", "mean"]
Visual = Literal["folded", "rows", "tokens"]

#: what each view is called on a button
TITLES: dict[Visual, str] = {
    "folded": "picture in one row",
    "rows": "rows of the picture",
    "tokens": "every patch",
}
#: the labels of visual tokens, as `MultimodalInputs.labels` and traces of the tower give them
LABEL = re.compile(r"<(?:img(\d*)|patch)(?: (\d+),(\d+)| cls)>")
MAX_LABEL = 24


@dataclass(frozen=True)
class Row:
    """One row of a view."""

    label: str
    members: tuple[int, ...]
    """Which of the labels it stands for."""
    visual: bool
    """Whether these are visual tokens."""


@dataclass(frozen=True)
class View:
    """One way to show positions."""

    name: Visual
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What it is called on a button."""
        return TITLES[self.name]

    def fold(
        self, values: Float[np.ndarray, "*panel position column"], how: Fold
    ) -> tuple[Float[np.ndarray, "*panel row column"], Int[np.ndarray, "*panel row column"]]:
        """The values of each row, and which position has the largest of its row.

        Args:
            values: of each position.
            how: of several positions take the one of the largest size ("peak", with its sign),
                the "sum" or the "mean".
        """
        folded, largest = [], []
        for row in self.rows:
            part = values[..., list(row.members), :]
            best = np.abs(np.nan_to_num(part)).argmax(axis=-2)
            peak = np.take_along_axis(part, best[..., None, :], axis=-2)[..., 0, :]
            folded.append(peak if how == "peak" else getattr(np, f"nan{how}")(part, axis=-2))
            largest.append(np.array(row.members)[best])
        return np.stack(folded, axis=-2), np.stack(largest, axis=-2)


def patch_of(label: str) -> tuple[int, int, int] | None:
    """Image, row and column of a visual token by its label (-1, -1 for a class token), or None."""
    found = LABEL.fullmatch(label)
    if found is None:
        return None
    image, row, column = found.groups()
    return int(image or 0), int(-1 if row is None else row), int(-1 if column is None else column)


def views(labels: Sequence[str]) -> list[View]:
    """The ways to show these positions: folded, rows of the picture, every patch.

    Those that fold nothing are left out; every patch is always there, and last.

    Example:
        >>> [len(view.rows) for view in views(inputs.labels())]     # 22 words, 24 x 24 patches
        [23, 46, 598]
    """
    patches = [patch_of(label) for label in labels]
    several = len({patch[0] for patch in patches if patch}) > 1

    def row(members: list[int]) -> Row:
        first = patches[members[0]]
        if len(members) == 1 or first is None:
            text = shorten(visible(labels[members[0]]), MAX_LABEL)
            return Row(text, tuple(members), first is not None)
        name = f"image {first[0]}" if several else "image"
        one_row = patches[members[-1]][1] == first[1]  # type: ignore[index]
        what = f"{name} row {first[1]}" if one_row else f"{name} ({len(members)} tokens)"
        return Row(what, tuple(members), True)

    def grouped(depth: int) -> tuple[Row, ...]:
        """Neighbours of one image (depth 1) or of one row of it (depth 2) together."""

        def key(index: int) -> tuple[int, ...]:
            patch = patches[index]
            return (-1, index) if patch is None else patch[:depth]

        return tuple(row(list(members)) for _, members in groupby(range(len(labels)), key))

    found = [View("tokens", tuple(row([index]) for index in range(len(labels))))]
    groupings: tuple[tuple[Visual, int], ...] = (("rows", 2), ("folded", 1))
    for name, depth in groupings:
        rows = grouped(depth)
        if len(rows) < len(found[0].rows):
            found.insert(0, View(name, rows))
    return found


def chosen(all_views: Sequence[View], visual: Visual) -> int:
    """The index of the view of that name, or of the first where nothing is folded so.

    Raises:
        ValueError: no view is ever called that.
    """
    if visual not in TITLES:
        raise ValueError(f"visual must be one of {', '.join(TITLES)}, not {visual!r}")
    names = [view.name for view in all_views]
    return names.index(visual) if visual in names else 0
