"""Positions as rows of a figure: words one by one, the visual tokens of an image together.

An image is hundreds of positions among two dozen words. Figures show it as one row, which unfolds
to the rows of the image and to every patch; each of these is a `Folding` of the same labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mmlens.inputs.position_labels import VisualLabel, visual_label
from mmlens.plots.labels import shorten, visible

Fold = Literal["peak", "sum", "mean"]
Visual = Literal["folded", "rows", "tokens"]

#: what each folding is called on a button
TITLES: dict[Visual, str] = {
    "folded": "image in one row",
    "rows": "rows of the image",
    "tokens": "every patch",
}
MAX_LABEL = 32


@dataclass(frozen=True)
class Row:
    """One row of a folding."""

    label: str
    members: tuple[int, ...]
    """Which of the labels it stands for."""
    visual: bool
    """Whether these are visual tokens."""


@dataclass(frozen=True)
class Folding:
    """One way to show positions: each row holds one or several of them."""

    name: Visual
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What it is called on a button."""
        return TITLES[self.name]

    def fold(
        self, values: Float[np.ndarray, "*panel position column"], how: Fold
    ) -> tuple[Float[np.ndarray, "*panel row column"], Int[np.ndarray, "*panel row column"]]:
        """Return the values of each row, and which position has the largest of its row.

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


def foldings(labels: Sequence[str]) -> list[Folding]:
    """Return the ways to show these positions: folded, rows of the image, every patch.

    Rows are those of each view of the image. Visual tokens that are no patch, such as the ends of
    lines, have one row for all of a kind. Ways that fold nothing are left out; every patch is
    always there, and last.

    Example:
        >>> [len(way.rows) for way in foldings(inputs.labels())]     # 22 words, 24 x 24 patches
        [23, 46, 598]
    """
    tokens = [visual_label(label) for label in labels]
    several = len({token.image for token in tokens if token}) > 1

    def row(members: list[int]) -> Row:
        here = [token for member in members if (token := tokens[member])]
        if len(members) == 1 or not here:
            text = shorten(visible(labels[members[0]]), MAX_LABEL)
            return Row(text, tuple(members), bool(here))
        name = f"image {here[0].image}" if several else "image"
        return Row(f"{name} {what(here)}", tuple(members), True)

    def grouped(by_row: bool) -> tuple[Row, ...]:
        """Group what belongs to an image, or to one row of a view; in the order of their ends."""
        groups: dict[object, list[int]] = {}
        for index, token in enumerate(tokens):
            key: object = index
            if token is not None:
                key = (token.stem, token.view, token.row, token.mark) if by_row else token.stem
            groups.setdefault(key, []).append(index)
        return tuple(row(members) for members in sorted(groups.values(), key=lambda g: g[-1]))

    found = [Folding("tokens", tuple(row([index]) for index in range(len(labels))))]
    groupings: tuple[tuple[Visual, bool], ...] = (("rows", True), ("folded", False))
    for name, by_row in groupings:
        rows = grouped(by_row)
        if len(rows) < len(found[0].rows):
            found.insert(0, Folding(name, rows))
    return found


def what(tokens: Sequence[VisualLabel]) -> str:
    """Return what several visual tokens of an image are, after its name."""
    first = tokens[0]
    if len({(token.view, token.row, token.mark) for token in tokens}) > 1:
        return f"({len(tokens)} tokens)"
    if first.mark:
        return f"{shorten(visible(first.mark), MAX_LABEL)} ({len(tokens)})"
    if first.view is None:
        return f"row {first.row}"
    view = "tile" if first.stem.startswith("patch") else "view"
    return f"{'every tile' if first.view == '*' else f'{view} {first.view}'} row {first.row}"


def folding_index(all_foldings: Sequence[Folding], visual: Visual) -> int:
    """Return the index of the folding of that name, or of the first where nothing can be folded so.

    Raises:
        ValueError: none is ever called that.
    """
    if visual not in TITLES:
        raise ValueError(f"visual must be one of {', '.join(TITLES)}, not {visual!r}")
    names = [folding.name for folding in all_foldings]
    return names.index(visual) if visual in names else 0
