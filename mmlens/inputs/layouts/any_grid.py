"""`AnyGrid`: every image is one view of as many patches as it asks for (Qwen2-VL, 2.5, 3).

    <|vision_start|><|image_pad|> ... <|image_pad|><|vision_end|>

The image is scaled so that both sides are whole squares of patches and its area lies between two
bounds; each square is one visual token. Sources: Wang et al. 2024, "Qwen2-VL", 2.1 ("naive dynamic
resolution"); transformers, `image_processing_qwen2_vl.py` and `processing_qwen2_vl.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmlens.inputs.checks import check_images
from mmlens.inputs.image_tokens import Box, Grid, ImageTokens, grid_cells
from mmlens.inputs.layouts.layout import (
    MultimodalConfig,
    ProcessedImage,
    check_known,
    placed_blocks,
)
from mmlens.inputs.visual import Visual

KNOWN = ("pixel_values", "image_grid_thw")


@dataclass(frozen=True)
class AnyGrid:
    """One view, whose cells are squares of patches."""

    cfg: MultimodalConfig

    @property
    def side(self) -> int:
        """Patches of a square's side."""
        vision: Any = self.cfg.vision
        return vision.merge_size

    def processed(
        self, image_processor: Any, tokenizer: Any, images: Sequence[Image.Image]
    ) -> list[ProcessedImage]:
        """Return the images of one prompt, each in its own grid.

        Raises:
            ValueError: the image processor gives what the model does not take.
        """
        if (squares := getattr(image_processor, "merge_size", self.side)) != self.side:
            raise ValueError(
                f"the image processor lays out patches in squares of merge_size={squares}, but the "
                f"model merges squares of {self.side}: give both one size"
            )
        batch = image_processor(images=list(images), return_tensors="pt")
        pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
        parts = pixels.split(self._patches(pixels, grids))
        return [
            self._one(part, grid, replace(self._tokens(grid), image=image, boxes=whole))
            for part, grid, image in zip(parts, grids, images, strict=True)
        ]

    def random_image(self, generator: torch.Generator, *, small: bool = False) -> ProcessedImage:
        """Return random patches of 8 x 12 squares, or of 2 x 3."""
        rows, cols = (2 * self.side, 3 * self.side) if small else (8 * self.side, 12 * self.side)
        pixels = torch.randn(rows * cols, self._width, generator=generator)
        grid = torch.tensor([1, rows, cols])
        return self._one(pixels, grid, self._tokens(grid))

    def _one(self, pixels: Tensor, grid: Tensor, tokens: ImageTokens) -> ProcessedImage:
        visual = {"pixel_values": pixels, "image_grid_thw": grid[None]}
        return ProcessedImage(visual, [self.cfg.image_token_id or 0] * tokens.length, tokens)

    def description(self) -> str:
        """How many visual tokens an image has, in words."""
        vision: Any = self.cfg.vision
        pixels = vision.patch_size * self.side
        return f"one for each square of {pixels} x {pixels} pixels"

    @property
    def _width(self) -> int:
        """Numbers of one patch."""
        vision: Any = self.cfg.vision
        return vision.n_channels * vision.temporal_patch_size * vision.patch_size**2

    def _patches(self, pixels: Tensor, grids: Tensor) -> list[int]:
        """Return how many patches each image has.

        Raises:
            ValueError: pixels or grids of another shape, which do not belong together, or a video.
        """
        if grids.ndim != 2 or grids.shape[1] != 3 or grids.is_floating_point():
            raise ValueError(
                f"image_grid_thw has shape {tuple(grids.shape)} of {grids.dtype}; it must be whole "
                "numbers [image, 3]: time, rows and columns of patches of each image"
            )
        wrong = [
            grid
            for grid in grids.tolist()
            if grid[0] != 1 or any(n % self.side or n < 1 for n in grid[1:])
        ]
        if wrong:
            raise ValueError(
                f"image_grid_thw has {wrong[0]}: an image has time 1 (this model takes no videos "
                f"here), and rows and columns that are multiples of {self.side}"
            )
        counts = [math.prod(grid) for grid in grids.tolist()]
        if pixels.ndim != 2 or len(pixels) != sum(counts) or pixels.shape[1] != self._width:
            raise ValueError(
                f"pixel_values has shape {tuple(pixels.shape)}; for grids {grids.tolist()} it must "
                f"be ({sum(counts)}, {self._width}): patches, and the numbers of each"
            )
        if not pixels.is_floating_point():
            raise ValueError(f"pixel values must be floats, not {pixels.dtype}")
        return counts

    def _tokens(self, grid: Tensor) -> ImageTokens:
        """Return one image's tokens."""
        cells: Grid = (int(grid[1]) // self.side, int(grid[2]) // self.side)
        return ImageTokens(0, grid_cells(cells), (cells,), mrope=True)

    def located(
        self, tokens: Tensor, mask: Tensor, tokenizer: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Visual | None, tuple[ImageTokens, ...]]:
        """Return the patches, and the images: a block of image tokens for each grid."""
        check_known(batch, KNOWN)
        if (pixels := batch.get("pixel_values")) is None:
            check_images(
                tokens, mask, None, image_token_id=self.cfg.image_token_id, n_visual_tokens=0
            )
            return None, ()
        if self.cfg.vision is None:
            raise ValueError(
                "pixel values for a language model that sees none (cfg.vision is None)"
            )
        if (grids := batch.get("image_grid_thw")) is None:
            raise ValueError(
                "pixel_values without image_grid_thw: this model needs the grid of each image, "
                "which transformers' processor returns beside them"
            )
        counts = tuple(self._patches(pixels, grids))
        images = [self._tokens(grid) for grid in grids]
        lengths = [image.length for image in images]
        places = placed_blocks(tokens, self.cfg.image_token_id, lengths)
        return Visual(
            {"pixel_values": pixels, "image_grid_thw": grids},
            {"pixel_values": counts, "image_grid_thw": (1,) * len(counts)},
        ), tuple(
            replace(image, row=row, start=start)
            for image, (row, start) in zip(images, places, strict=True)
        )


def whole(size: tuple[int, int]) -> list[Box]:
    """Return what the one view shows: all of an image of that width and height."""
    return [Box(0, 0, *size)]


def with_pixel_bounds(image_processor: Any, least: int | None, most: int | None) -> Any:
    """Return the image processor with other bounds of an image's area, in pixels after scaling.

    Args:
        image_processor: transformers', of Qwen2-VL or its successors.
        least: of pixels; None leaves it as it is.
        most: the same. Each visual token is a square of them, so this is what an image costs.

    Raises:
        ValueError: no positive whole numbers, or the least above the most.
    """
    before = image_processor.size
    size = dict(before)
    given = {"shortest_edge": least, "longest_edge": most}
    size |= {name: value for name, value in given.items() if value is not None}
    low, high = size["shortest_edge"], size["longest_edge"]
    if not all(type(value) is int and value > 0 for value in (low, high)) or low > high:
        raise ValueError(
            f"min_pixels={low!r} and max_pixels={high!r}; they must be whole numbers above 0, the "
            "first no larger than the second"
        )
    changed = copy.copy(image_processor)
    changed.size = type(before)(**size)
    return changed
