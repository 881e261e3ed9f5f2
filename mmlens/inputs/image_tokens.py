"""`ImageTokens`: where the visual tokens of one image stand, and which part of it each one is.

    image = inputs.images[0]
    image.start, image.length        # its place in the row
    image.cells[3]                   # (view, row, column) of its fourth position
    image.views[1].box               # what a view shows: left, top, right, bottom in pixels

A model may see an image several times: whole, and in tiles. Each time is a `View` with a grid of
cells, one visual token each. Positions that are no cell (a class token, the embedding of a line's
end, a separator between tiles) have -1 in `cells`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

__all__ = ["Box", "Grid", "ImageTokens", "View", "check_same_cells", "grid_cells"]

Grid = tuple[int, int]
"""Rows and columns."""


class Box(NamedTuple):
    """A rectangle of an image, in its pixels; beyond 0 ... width or height lies padding."""

    left: float
    top: float
    right: float
    bottom: float

    def columns(self, n: int) -> Float[np.ndarray, " edge"]:
        """Return the n + 1 vertical lines between n columns of cells."""
        return np.linspace(self.left, self.right, n + 1)

    def rows(self, n: int) -> Float[np.ndarray, " edge"]:
        """Return the n + 1 horizontal lines between n rows of cells."""
        return np.linspace(self.top, self.bottom, n + 1)


@dataclass(frozen=True)
class View:
    """One way in which a model sees an image."""

    grid: Grid
    """Cells: rows, columns."""
    box: Box | None
    """Which rectangle of the image the cells cover; None where the image is not known."""

    def cell_box(self, row: int, col: int) -> Box:
        """Return the rectangle of one cell in the image.

        Raises:
            ValueError: the image is not known.
        """
        if self.box is None:
            raise ValueError("where the cells lie in the image is unknown: the inputs hold none")
        (rows, cols), (left, top, right, bottom) = self.grid, self.box
        width, height = (right - left) / cols, (bottom - top) / rows
        x, y = left + col * width, top + row * height
        return Box(x, y, x + width, y + height)


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The positions of one image in its row. Made by `prepare` and `inputs_from_tokens`."""

    start: int
    """Its first position."""
    cells: Int[Tensor, "length 3"]
    """(view, row, column) of every position from `start` on; -1 where a position is no cell."""
    grids: tuple[Grid, ...]
    """Rows and columns of each view; view 0 shows the whole image."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """What a visual token is that is no cell, by its offset from `start`: "cls", "newline"."""
    row: int = 0
    """Which row of the batch."""
    mrope: bool = False
    """Whether its tokens have rotary positions by row and column (M-RoPE); else they are counted
    as words are."""
    image_processor: Any = None
    """What has made its pixels, where that is not the model's own."""
    image: Image.Image | None = None
    """The image as it was given."""
    boxes: Callable[[tuple[int, int]], Sequence[Box]] | None = None
    """Returns what each view shows of an image of that width and height."""

    @property
    def length(self) -> int:
        """Positions from the first one of the image to its last."""
        return len(self.cells)

    @cached_property
    def is_visual(self) -> Tensor:
        """Where the positions are visual tokens, and no separators: [length] booleans."""
        visual = self.cells[:, 0] >= 0
        visual[list(self.marks)] = True
        return visual

    @cached_property
    def positions(self) -> Int[Tensor, " visual_token"]:
        """The positions of the visual tokens, in order."""
        return self.is_visual.nonzero().flatten() + self.start

    @cached_property
    def views(self) -> tuple[View, ...]:
        """The views, with the rectangle that each shows."""
        boxes: Sequence[Box | None] = [None] * len(self.grids)
        if self.image is not None and self.boxes is not None:
            boxes = self.boxes(self.image.size)
        return tuple(View(grid, box) for grid, box in zip(self.grids, boxes, strict=True))

    def view(self, view: int) -> int:
        """Return the number of a view.

        Raises:
            ValueError: no such view.
        """
        is_number = isinstance(view, int | np.integer)
        if not is_number or not 0 <= view < len(self.grids):
            raise ValueError(f"view={view!r}; this image has {len(self.grids)} view(s), from 0")
        return view

    def view_with_cells(self, view: int) -> int:
        """Return the number of a view that has cells.

        Raises:
            ValueError: no such view, or one without: of an image so narrow that less than a row of
                patches shows it, the tiles may be padding alone, which the model leaves out.
        """
        if not min(self.grids[self.view(view)]):
            raise ValueError(
                f"view {view} of this image has no patches: it is so narrow that the tiles are "
                "padding alone, which the model leaves out; view 0 shows all of it"
            )
        return view

    def block(self, box: tuple[int, int, int, int], view: int = 0) -> Tensor:
        """Return the positions of a rectangle of cells, in reading order.

        Args:
            box: `(row0, col0, row1, col1)`, half open.
            view: which view; 0 shows the whole image.

        Raises:
            ValueError: an empty box or one that leaves the grid, or no such view.
        """
        n_rows, n_cols = self.grids[self.view_with_cells(view)]
        if len(box) != 4:
            raise ValueError(f"a block is (row0, col0, row1, col1) in patches, not {tuple(box)}")
        row0, col0, row1, col1 = box
        if not (0 <= row0 < row1 <= n_rows and 0 <= col0 < col1 <= n_cols):
            raise ValueError(
                f"patches {box} (row0, col0, row1, col1; half open) are not inside the grid of "
                f"{n_rows} rows x {n_cols} columns: rows go from 0 to {n_rows - 1}, columns from 0 "
                f"to {n_cols - 1}"
            )
        of_view, row, col = self.cells.unbind(-1)
        inside = (of_view == self.view(view)) & (row >= row0) & (row < row1)
        inside &= (col >= col0) & (col < col1)
        found = inside.nonzero().flatten() + self.start
        if len(found) < (row1 - row0) * (col1 - col0):
            raise ValueError("patch (0, 0) has no visual token: this model leaves it out")
        return found

    def inside(self, box: Sequence[float]) -> Tensor:
        """Return the positions of every view's cells of which at least half lies in a box.

        What a cell shows beyond the image's edge, which is padding, does not count. Where that is
        none, since the box is smaller than the cells, those that hold most of it: of the whole
        image, and of its tiles together.

        Args:
            box: (left, top, right, bottom), in pixels of the image.

        Raises:
            ValueError: the image is not known, or the box is none, empty, or shown by no cell.
        """
        if len(box) != 4:
            raise ValueError(f"a box is (left, top, right, bottom) in pixels, not {tuple(box)}")
        left, top, right, bottom = box
        if not (left < right and top < bottom):
            raise ValueError(f"the box {tuple(box)} (left, top, right, bottom) is empty")
        asked = Box(left, top, right, bottom)
        found = [at for cells in self.seen_cells() for at in _inside(cells, asked)]
        if not found:
            raise ValueError(
                f"no visual token shows the box {tuple(box)} (left, top, right, bottom): it "
                "lies outside of what the model sees of the image"
            )
        return torch.tensor(sorted(found), dtype=torch.long)

    def seen_cells(self) -> tuple[dict[int, Box], dict[int, Box]]:
        """Return what cells of the whole image, and those of its tiles, show, by position."""
        whole: dict[int, Box] = {}
        tiles: dict[int, Box] = {}
        for offset, (view, row, col) in self._cells():
            cells = tiles if view else whole
            cells[self.start + offset] = self.seen(self.views[view].cell_box(row, col))
        return whole, tiles

    def seen(self, cell: Box) -> Box:
        """Return the part of a cell that is no padding; all of it where it shows nothing else."""
        assert self.image is not None  # where cells have boxes
        width, height = self.image.size
        part = Box(
            max(cell.left, 0.0),
            max(cell.top, 0.0),
            min(cell.right, float(width)),
            min(cell.bottom, float(height)),
        )
        return part if part.left < part.right and part.top < part.bottom else cell

    def _cells(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        for offset, (view, row, col) in enumerate(self.cells.tolist()):
            if view >= 0:
                yield offset, (view, row, col)

    def labels(self, several: str = "") -> dict[int, str]:
        """Return a label for every visual token, by its position: `<img 3,5>`.

        Of an image with several views the label begins with the view: `<img 1:3,5>`.

        Args:
            several: which image of the row, where it has more than one.
        """
        views = len(self.grids) > 1
        named = {
            self.start + offset: f"<img{several} {f'{view}:' if views else ''}{row},{col}>"
            for offset, (view, row, col) in self._cells()
        }
        return named | {self.start + at: f"<img{several} {it}>" for at, it in self.marks.items()}


def grid_cells(grid: Grid, view: int = 0) -> Int[Tensor, "cell 3"]:
    """Return the cells of a whole view, row by row."""
    rows, cols = torch.arange(grid[0]), torch.arange(grid[1])
    return torch.cartesian_prod(torch.tensor([view]), rows, cols)


def check_same_cells(new: ImageTokens, old: ImageTokens) -> None:
    """Raise a ValueError unless an image has the same patches as the one whose place it takes.

    In families with a view for each tile, as many tiles may lie otherwise (2 x 3 and 3 x 2), which
    their cells alone do not tell where no text stands between them.
    """
    fit = "give one of the same size, or fit=True (swap_image, ImagePair.inputs)"
    if not torch.equal(new.cells, old.cells):
        raise ValueError(
            f"the other image has {len(new.positions)} visual tokens in views of "
            f"{list(new.grids)} patches, the one before {len(old.positions)} in "
            f"{list(old.grids)}: {fit}"
        )
    pairs = zip(_tiles_in_whole(new), _tiles_in_whole(old), strict=False)
    for view, (there, here) in enumerate(pairs, start=1):
        if max(abs(a - b) for a, b in zip(there, here, strict=True)) > 1e-6:
            raise ValueError(
                f"the other image has as many tiles, but they lie otherwise: of its whole, view "
                f"{view} shows {_percent(there)} (left, top, right, bottom), that of the one "
                f"before {_percent(here)}: {fit}"
            )


def _tiles_in_whole(image: ImageTokens) -> list[Box]:
    """Return where in the whole each tile lies, from 0 to 1, where tiles are views of their own."""
    whole, *tiles = image.views
    if len(tiles) < 2 or whole.box is None:  # one view of all tiles is one grid
        return []
    left, top, right, bottom = whole.box
    origin, length = (left, top) * 2, (right - left, bottom - top) * 2
    boxes = [tile.box for tile in tiles if tile.box is not None]
    return [
        Box(*((side - first) / n for side, first, n in zip(box, origin, length, strict=True)))
        for box in boxes
    ]


def _percent(box: Box) -> str:
    return ", ".join(f"{side:.0%}" for side in box)


def _inside(cells: Mapping[int, Box], asked: Box) -> list[int]:
    """The cells that lie in a box by half or more, or else those that hold most of it."""
    found = [position for position, cell in cells.items() if _share(cell, asked) >= 0.5]
    if found:
        return found
    held = {position: _share(asked, cell) for position, cell in cells.items()}
    most = max(held.values(), default=0.0)
    return [position for position, share in held.items() if share and share > most * (1 - 1e-6)]


def _share(cell: Box, box: Box) -> float:
    """Return how much of a cell lies in a box, from 0 to 1."""
    width = min(cell.right, box.right) - max(cell.left, box.left)
    height = min(cell.bottom, box.bottom) - max(cell.top, box.top)
    area = (cell.right - cell.left) * (cell.bottom - cell.top)
    return max(width, 0.0) * max(height, 0.0) / area
