"""`ImageMesh`: areas of an image, and the visual tokens that show each of them.

Of one view the areas are its cells. Of several, which cut the image differently, they are the
pieces between all their lines: each lies in one cell of a view, or in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mmlens.inputs.image_tokens import Box, Grid, ImageTokens

ShownView = int | Literal["all"]
"""A view by its number, or all of them."""


@dataclass(frozen=True, eq=False)
class ImageMesh:
    """Rectangular areas between vertical lines `x` and horizontal lines `y`, in the image's pixels.

    Example:
        >>> mesh = ImageMesh.of(inputs.images[0], "all")
        >>> mesh.mean(norms)        # [row, column], norms of the image's visual tokens
    """

    x: Float[np.ndarray, " vertical_line"]
    y: Float[np.ndarray, " horizontal_line"]
    tokens: Int[np.ndarray, "view row column"]
    """Which of the image's visual tokens shows an area, by view; -1 where none does."""
    frames: tuple[Box, ...]
    """What each view shows."""
    names: tuple[str, ...]
    """Of the visual tokens, for people."""

    @classmethod
    def of(cls, image: ImageTokens, view: ShownView = 0, frame: Box | None = None) -> ImageMesh:
        """Return the mesh of one view, or of all.

        Args:
            image: with its views.
            view: which one, or "all".
            frame: where the cells of a single view lie, instead of what it says itself.

        Raises:
            ValueError: no such view, one without cells, a frame for several, or no telling where
                the cells lie.
        """
        shown = range(len(image.grids)) if view == "all" else [image.view_with_cells(view)]
        if frame is not None and len(shown) > 1:
            raise ValueError('frame= is that of one view: choose it with view=0 instead of "all"')
        boxes = [image.views[index].box if frame is None else frame for index in shown]
        cells = image.cells[image.is_visual].tolist()
        views = []
        for index, box in zip(shown, boxes, strict=True):
            if box is None:
                raise ValueError("where the patches lie in the image is unknown: give frame=")
            views.append((index, image.grids[index], box))
        return cls.of_cells(cells, views, several=len(image.grids) > 1)

    @classmethod
    def of_cells(
        cls,
        cells: Sequence[Sequence[int]],
        views: Sequence[tuple[int, Grid, Box]],
        *,
        several: bool,
    ) -> ImageMesh:
        """Return the mesh of some views.

        Args:
            cells: (view, row, column) of every visual token.
            views: the number, the grid and the rectangle of those that are shown.
            several: whether the image has several views, shown or not.
        """
        columns = [box.columns(grid[1]) for _, grid, box in views]
        rows = [box.rows(grid[0]) for _, grid, box in views]
        x, y = merged(columns), merged(rows)
        tokens = np.full((len(views), len(y) - 1, len(x) - 1), -1)
        for place, (number, grid, _) in enumerate(views):
            of_cell = np.full((grid[0] + 1, grid[1] + 1), -1)  # the last ones are outside
            for token, (view, row, column) in enumerate(cells):
                if view == number:
                    of_cell[row, column] = token
            there = np.ix_(cell_at(y, rows[place]), cell_at(x, columns[place]))
            tokens[place] = of_cell[there]
        frames = tuple(box for _, _, box in views)
        return cls(x, y, tokens, frames, tuple(cell_names(cells, several)))

    def mean(
        self, values: Float[np.ndarray, "*layers_and_heads visual_token"]
    ) -> Float[np.ndarray, "*layers_and_heads row column"]:
        """Return the mean over views of the values that show an area; NaN where none does.

        Args:
            values: of the image's visual tokens; NaN where one has none.
        """
        padded = np.concatenate([values, np.full_like(values[..., :1], np.nan)], axis=-1)
        by_view = padded[..., self.tokens]
        known = ~np.isnan(by_view)
        counts = known.sum(axis=-3)
        sums = np.where(known, by_view, 0).sum(axis=-3, dtype=values.dtype)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(values.dtype)

    def said(self) -> list[list[str]]:
        """Return the names of the visual tokens that show each area."""
        return [
            ["<br>".join(self.names[token] for token in area if token >= 0) for area in row]
            for row in np.moveaxis(self.tokens, 0, -1).tolist()
        ]


def merged(lines: Sequence[Float[np.ndarray, " _"]]) -> Float[np.ndarray, " line"]:
    """Return all lines in order; those of different views that coincide are one."""
    if len(lines) == 1:
        return lines[0]
    every = np.unique(np.concatenate(lines))
    apart = np.diff(every, prepend=-np.inf) > 1e-6 * max(1.0, float(np.ptp(every)))
    return every[apart]


def cell_at(
    lines: Float[np.ndarray, " line"], of_view: Float[np.ndarray, " edge"]
) -> Int[np.ndarray, " area"]:
    """Return which of a view's rows (or columns) holds each area between lines; the last + 1: none.

    Args:
        lines: of the mesh.
        of_view: edges of the view's rows or columns.
    """
    n = len(of_view) - 1
    middles = (lines[1:] + lines[:-1]) / 2
    found = np.searchsorted(of_view, middles, side="right") - 1
    return np.where((found < 0) | (found >= n), n, found)


def cell_names(cells: Sequence[Sequence[int]], several: bool) -> list[str]:
    """Return "row 3, column 5" of each visual token, with its view where there are several."""
    return [
        f"{f'view {view}: ' if several else ''}row {row}, column {column}"
        for view, row, column in cells
    ]
