"""`OneGrid`: every image is one view, scaled to the tower's size (LLaVA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmlens.inputs.checks import check_images, image_positions, image_starts
from mmlens.inputs.image_frame import measured_frame
from mmlens.inputs.image_tokens import Box, Grid, ImageTokens, grid_cells
from mmlens.inputs.images import as_image_processor
from mmlens.inputs.layouts.layout import MultimodalConfig, ProcessedImage, check_known, check_pixels
from mmlens.inputs.visual import Visual


@dataclass(frozen=True)
class OneGrid:
    """Every image is one view, scaled to the same size: LLaVA (Liu et al. 2023)."""

    cfg: MultimodalConfig

    def processed(
        self, image_processor: Any, tokenizer: Any, images: Sequence[Image.Image]
    ) -> list[ProcessedImage]:
        """Return the images of one prompt, of the tower's size."""
        pixels = as_image_processor(image_processor)(list(images))
        if len(pixels) != len(images):
            raise ValueError(
                f"the image processor makes {len(pixels)} arrays of pixels of {len(images)} "
                "image(s): this model takes one of each, so its crops (Gemma 3's pan and scan) "
                "must be off: image_processor.do_pan_and_scan = False"
            )
        grid = self._grid(check_pixels(pixels, self.cfg))
        boxes = partial(_whole_frame, image_processor, pixels.shape[-2] // grid[0], grid)
        tokens = self._tokens(grid)
        ids = [self.cfg.image_token_id or 0] * tokens.length
        return [
            ProcessedImage(
                {"pixel_values": pixels[i : i + 1]}, ids, replace(tokens, image=image, boxes=boxes)
            )
            for i, image in enumerate(images)
        ]

    def _grid(self, patches: Grid) -> Grid:
        """Return rows and columns of visual tokens, of one or several patches each.

        Raises:
            ValueError: patches that cannot be put together, or not to a square.
        """
        projector = getattr(self.cfg, "projector", None)
        merged = 1 if projector is None else projector.merged
        if merged > 1 and (patches[0] != patches[1] or patches[0] % merged):
            raise ValueError(
                f"images of {patches[0]} x {patches[1]} patches; this model makes a visual token "
                f"of {merged} x {merged}, and takes square images that are so divided"
            )
        return patches[0] // merged, patches[1] // merged

    def _tokens(self, grid: Grid) -> ImageTokens:
        """Return one image's tokens: a class token in front of its patches, or the first left out.

        The tower interpolates its positions for another grid than its own.
        """
        vision: Any = self.cfg.vision
        first = vision.n_visual_tokens - math.prod(vision.grid)
        cells = grid_cells(grid)[max(-first, 0) :]
        if first > 0:
            cells = torch.cat([torch.full((first, 3), -1), cells])
        return ImageTokens(0, cells, (grid,), dict.fromkeys(range(first), "cls"))

    def random_image(self, generator: torch.Generator, *, small: bool = False) -> ProcessedImage:
        """Return random pixels of the tower's size, or of four patches."""
        vision: Any = self.cfg.vision
        merged = self.cfg.projector.merged if self.cfg.projector else 1
        sides = (2 * merged * vision.patch_size,) * 2 if small else vision.image_size
        pixels = torch.randn(1, vision.n_channels, *sides, generator=generator)
        tokens = self._tokens((2, 2) if small else self._grid(vision.grid))
        ids = [self.cfg.image_token_id or 0] * tokens.length
        return ProcessedImage({"pixel_values": pixels}, ids, tokens)

    def description(self) -> str:
        """How many visual tokens an image has, in words."""
        assert self.cfg.vision is not None
        return str(self.cfg.mm_tokens_per_image)

    def located(
        self, tokens: Tensor, mask: Tensor, tokenizer: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Visual | None, tuple[ImageTokens, ...]]:
        """Return the pixels, and the images: blocks of as many image tokens as a grid has."""
        check_known(batch, ("pixel_values",))
        pixels = batch.get("pixel_values")
        grid = self.cfg.vision.grid if self.cfg.vision else (0, 0)
        if pixels is not None:
            grid = check_pixels(pixels, self.cfg, any_size=True)
        grid = self._grid(grid)
        one = self._tokens(grid) if self.cfg.vision else ImageTokens(0, grid_cells((0, 0)), ())
        n_images = None if pixels is None else len(pixels)
        image_token = self.cfg.image_token_id
        check_images(tokens, mask, n_images, image_token_id=image_token, n_visual_tokens=one.length)
        if pixels is None:
            return None, ()
        images = [
            replace(one, start=start, row=row)
            for row, visual in enumerate(image_positions(tokens, image_token).cpu())
            for start in image_starts(visual, one.length)
        ]
        return Visual({"pixel_values": pixels}, {"pixel_values": (1,) * len(pixels)}), tuple(images)


def _whole_frame(processor: Any, patch: int, grid: Grid, size: tuple[int, int]) -> list[Box]:
    """Return the part of an image that one view's patches cover."""
    return [measured_frame(processor, size, (grid[0] * patch, grid[1] * patch))]
