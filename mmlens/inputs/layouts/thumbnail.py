"""`Thumbnail`: an image in tiles, and then the whole of it in one, without text between them.

    <img><IMG_CONTEXT> ... <IMG_CONTEXT></img>

That is how InternVL sees an image; one that fits into a single tile is seen whole only. Sources:
Chen et al. 2024, "How far are we to GPT-4V?", 3.2; transformers, `processing_internvl.py` and
`image_processing_got_ocr2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from mmlens.config import MultimodalConfig
from mmlens.inputs.checks import check_images, image_positions, shortened
from mmlens.inputs.image_tokens import Grid, ImageTokens, grid_cells
from mmlens.inputs.layouts.layout import ProcessedImage, check_known
from mmlens.inputs.layouts.row_col import covered_part, tile_grid, view_boxes
from mmlens.inputs.visual import Visual


@dataclass(frozen=True)
class Thumbnail:
    """View 0 is the whole image, whose tokens come last; views 1, 2, ... are the tiles in order."""

    cfg: MultimodalConfig

    def processed(
        self, image_processor: Any, tokenizer: Any, images: Sequence[Image.Image]
    ) -> list[ProcessedImage]:
        """Return the images of one prompt, in tiles.

        Raises:
            ValueError: the image processor gives what the model does not take.
        """
        # As transformers' processor, whatever the image processor's own setting is.
        batch = image_processor(images=list(images), crop_to_patches=True, return_tensors="pt")
        counts = [int(n) for n in batch["num_patches"]]
        pixels = batch["pixel_values"]
        grid, shown = tile_grid(pixels, self.cfg), covered_part(pixels, self.cfg)
        found = []
        for image, tiles in zip(images, pixels.split(counts), strict=True):
            tiling = self._tiling(image_processor, image, pixels, len(tiles))
            boxes = partial(view_boxes, tiling, shown)
            tokens = replace(self._tokens(grid, len(tiles)), image=image, boxes=boxes)
            found.append(ProcessedImage({"pixel_values": tiles}, self._ids(tokens), tokens))
        return found

    def _tiling(self, processor: Any, image: Image.Image, pixels: Tensor, n_tiles: int) -> Grid:
        """Return rows and columns of an image's tiles; 0 where it is seen whole only."""
        if n_tiles == 1:
            return 0, 0
        size, limits = (image.height, image.width), (processor.min_patches, processor.max_patches)
        columns, rows = get_optimal_tiled_canvas(size, tuple(pixels.shape[-2:]), *limits)
        if rows * columns + 1 != n_tiles:
            raise ValueError(
                f"the image processor made {n_tiles} tiles of an image of {image.width} x "
                f"{image.height} pixels, but {columns} x {rows} and the whole were expected"
            )
        return rows, columns

    def _tokens(self, grid: Grid, n_tiles: int) -> ImageTokens:
        """Return the tokens of an image in so many tiles, of which the last shows the whole."""
        cells = torch.cat([grid_cells(grid, view) for view in [*range(1, n_tiles), 0]])
        return ImageTokens(0, cells, (grid,) * n_tiles)

    def _ids(self, tokens: ImageTokens) -> list[int]:
        return [self.cfg.image_token_id or 0] * tokens.length

    def random_image(self, generator: torch.Generator, *, small: bool = False) -> ProcessedImage:
        """Return random pixels: of one tile and the whole, or of a small image seen whole only."""
        vision: Any = self.cfg.vision
        factor = self.cfg.projector.pixel_shuffle if self.cfg.projector else 1
        sides = (2 * factor * vision.patch_size,) * 2 if small else vision.image_size
        n_tiles = 1 if small else 3
        pixels = torch.randn(n_tiles, vision.n_channels, *sides, generator=generator)
        tokens = self._tokens(tile_grid(pixels, self.cfg), n_tiles)
        return ProcessedImage({"pixel_values": pixels}, self._ids(tokens), tokens)

    def description(self) -> str:
        """How many visual tokens an image has, in words."""
        return f"{self.cfg.mm_tokens_per_image} of each tile, and of the whole image"

    def located(
        self, tokens: Tensor, mask: Tensor, tokenizer: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Visual | None, tuple[ImageTokens, ...]]:
        """Return the tiles, and the images: stretches of image tokens without a gap."""
        check_known(batch, ("pixel_values",))
        image_token, pixels = self.cfg.image_token_id, batch.get("pixel_values")
        if pixels is None:
            check_images(tokens, mask, None, image_token_id=image_token, n_visual_tokens=0)
            return None, ()
        grid = tile_grid(pixels, self.cfg)
        images = []
        for row, here in enumerate(image_positions(tokens, image_token)):
            for start, stop in stretches(here):
                if (stop - start) % math.prod(grid):
                    raise ValueError(
                        f"{stop - start} image tokens from position {start} on in row {row}; each "
                        f"tile has {math.prod(grid)}, and the tiles of an image stand without a gap"
                    )
                one = self._tokens(grid, (stop - start) // math.prod(grid))
                images.append(replace(one, row=row, start=start))
        counts = tuple(len(image.grids) for image in images)
        if sum(counts) != len(pixels):
            raise ValueError(
                f"{len(pixels)} tiles, but the image tokens are those of "
                f"{shortened(torch.tensor(counts))}"
            )
        return Visual({"pixel_values": pixels}, {"pixel_values": counts}), tuple(images)


def stretches(visual: Tensor) -> list[tuple[int, int]]:
    """Return the start and the end of every stretch of positions that are True."""
    edges = torch.diff(visual.int(), prepend=visual.new_zeros(1).int()).cpu()
    starts = (edges == 1).nonzero().flatten().tolist()
    stops = (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, [*stops, len(visual)][: len(starts)], strict=True))
