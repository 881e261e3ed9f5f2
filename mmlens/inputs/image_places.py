"""Where the images of a batch stand among its positions: by row, by patch, and by pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mmlens.inputs.checks import tile_boxes
from mmlens.inputs.image_tokens import ImageTokens


class ImagePlaces:
    """Positions of patches, and patches of positions, for inputs that hold images."""

    if TYPE_CHECKING:  # of `MultimodalInputs`
        tokens: Tensor
        images: tuple[ImageTokens, ...]

        @property
        def device(self) -> torch.device:
            """Where the tensors are."""

        def __len__(self) -> int: ...

        def _row(self, batch: int) -> int: ...

    @cached_property
    def by_row(self) -> tuple[tuple[ImageTokens, ...], ...]:
        """The images of each row of the batch."""
        rows = range(len(self))
        return tuple(tuple(image for image in self.images if image.row == row) for row in rows)

    @property
    def n_images(self) -> tuple[int, ...]:
        """How many images each row has."""
        return tuple(map(len, self.by_row))

    def patch(
        self,
        row: int,
        col: int,
        *,
        image: int = 0,
        view: int = 0,
        batch: int | None = None,
    ) -> int:
        """Return the position of the visual token of one patch.

        Args:
            row: the patch's row, counted from the top.
            col: its column, counted from the left.
            image: which image of the row of the batch.
            view: which view of the image; 0 shows all of it at once.
            batch: as in `span`.

        Raises:
            ValueError: a patch outside of the grid, no such image or view, or rows that differ.
        """
        box = (row, col, row + 1, col + 1)
        return int(self.block(box, image=image, view=view, batch=batch)[0])

    def block(
        self,
        box: tuple[int, int, int, int],
        *,
        image: int = 0,
        view: int = 0,
        batch: int | None = None,
    ) -> Int[Tensor, " n"]:
        """Return the positions of a rectangle of patches of one view, in reading order.

        Args:
            box: `(row0, col0, row1, col1)` in patches, half open: `(0, 0, 2, 3)` is the six
                patches in the top left corner.
            image: as in `patch`.
            view: as in `patch`.
            batch: as in `span`.

        Raises:
            ValueError: an empty box or one that leaves the grid, no such image or view, rows that
                differ.
        """
        return self._same(image, batch, lambda tokens: tokens.block(box, view))

    def patches(
        self, box: Sequence[float], *, image: int = 0, batch: int | None = None
    ) -> Int[Tensor, " n"]:
        """Return the positions of all visual tokens, of every view, that show a box of the image.

        A token shows the box if at least half of its patch lies in it, padding beyond the image's
        edge left aside. A box that is smaller than the patches is shown by the tokens that hold
        most of it: of the whole image, and of its tiles together.

        Args:
            box: `(left, top, right, bottom)` in pixels of the image as it was given.
            image: as in `patch`.
            batch: as in `span`.

        Raises:
            ValueError: an empty box or one that no token shows, no such image, rows that differ, or
                inputs that do not hold the image (those from tokens).

        Example:
            >>> inputs.patches((100, 40, 180, 90))
        """
        return self._same(image, batch, lambda tokens: tokens.inside(box))

    def tiles(
        self,
        rows: int,
        columns: int,
        *,
        image: int = 0,
        view: int = 0,
        batch: int | None = None,
    ) -> list[Int[Tensor, " _"]]:
        """Cut a view of the image into rows x columns boxes of patches, in reading order.

        The sizes of boxes differ by at most one row or column.

        Raises:
            ValueError: more boxes than patches, or as `block`.
        """
        tokens = self._images_at(image, batch)[0]
        boxes = tile_boxes(tokens.grids[tokens.view_with_cells(view)], rows, columns)
        return [self.block(box, image=image, view=view, batch=batch) for box in boxes]

    def _images_at(self, image: int, batch: int | None) -> list[ImageTokens]:
        """Return an image of one row, or of every row."""
        found = []
        for row in range(len(self)) if batch is None else [self._row(batch)]:
            here = self.by_row[row]
            if not 0 <= image < len(here):
                raise ValueError(f"row {row} has {len(here)} image(s); there is no image {image}")
            found.append(here[image])
        return found

    def _same(
        self, image: int, batch: int | None, positions: Callable[[ImageTokens], Tensor]
    ) -> Tensor:
        """Return positions in an image, which must be the same in every row that counts."""
        found = [positions(tokens) for tokens in self._images_at(image, batch)]
        if any(not torch.equal(found[0], other) for other in found[1:]):
            starts = [tokens.start for tokens in self._images_at(image, batch)]
            raise ValueError(
                f"image {image} begins at other positions in other rows ({starts}), or has other "
                f"patches; give batch=0 ... {len(self) - 1}"
            )
        return found[0].to(self.device)

    @cached_property
    def grid(self) -> Int[Tensor, "batch pos 4"]:
        """From positions back to the images: `(image, view, row, column)` of every visual token.

        -1 elsewhere. `image` counts within the row of the batch; a visual token that is no patch
        (a class token, the end of a line) has view, row and column -1.
        """
        where = torch.full((*self.tokens.shape, 4), -1, dtype=torch.long)
        for row, images in enumerate(self.by_row):
            for number, image in enumerate(images):
                where[row, image.positions, 0] = number
                where[row, image.start : image.start + image.length, 1:] = image.cells
        return where.to(self.device)
