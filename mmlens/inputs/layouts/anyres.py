"""`AnyRes`: the whole image, and the image in tiles of the tower's size (LLaVA-NeXT, OneVision).

The image is scaled into the best of some resolutions and padded, and cut into tiles. Of their
patches, those that show padding are left out, and every line ends with a learnt embedding. Sources:
Liu et al. 2024, "LLaVA-NeXT"; Li et al. 2024, "LLaVA-OneVision", 3.2; transformers,
`models/llava_next` and `models/llava_onevision`.
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
from transformers.image_processing_utils import select_best_resolution

from mmlens.config import AnyResConfig, MultimodalConfig
from mmlens.inputs.image_tokens import Box, Grid, ImageTokens, grid_cells
from mmlens.inputs.images import check_scaled, largest_edge
from mmlens.inputs.layouts.layout import ProcessedImage, check_known, check_pixels, placed_blocks
from mmlens.inputs.visual import Visual


@dataclass(frozen=True)
class Tiling:
    """How an image of one size is cut into tiles, and which of their patches are kept."""

    resolution: Grid
    """Height and width that the image is scaled into, in pixels."""
    tiles: Grid
    """Rows and columns of tiles."""
    kept: tuple[slice, slice]
    """Rows and columns of patches, over all tiles, that show the image."""
    grid: Grid
    """Rows and columns of visual tokens: of the kept patches, after they were shrunk."""

    @classmethod
    def of(cls, size: Grid, cfg: AnyResConfig) -> Tiling:
        """Return the tiling of an image of this height and width."""
        height, width = size
        resolution = select_best_resolution(size, list(cfg.resolutions))
        tiles = (resolution[0] // cfg.tile_size, resolution[1] // cfg.tile_size)
        rows, cols = (n * side for n, side in zip(tiles, cfg.tile_grid, strict=True))
        kept = [slice(0, rows), slice(0, cols)]
        if width / height > cols / rows:
            shown = height * (cols / width)
            padding = (rows - int(round(shown, 7) if cfg.rounded else shown)) // 2
            kept[0] = slice(padding, rows - padding)
        else:
            shown = width * (rows / height)
            padding = (cols - int(round(shown, 7) if cfg.rounded else shown)) // 2
            kept[1] = slice(padding, cols - padding)
        grid = (kept[0].stop - kept[0].start, kept[1].stop - kept[1].start)
        if cfg.max_tiles is not None:
            ratio = math.sqrt(grid[0] * grid[1] / (cfg.max_tiles * cfg.tile_grid[0] ** 2))
            if ratio > 1.1:
                grid = (int(grid[0] // ratio), int(grid[1] // ratio))
        return cls(resolution, tiles, (kept[0], kept[1]), grid)


@dataclass(frozen=True)
class AnyRes:
    """View 0 is the whole image in one tile; view 1 the same in several, with more patches.

    Of a prompt with several images, OneVision sees each in view 0 alone.
    """

    cfg: MultimodalConfig

    @property
    def anyres(self) -> AnyResConfig:
        """What the tiles are like."""
        assert self.cfg.projector is not None and self.cfg.projector.anyres is not None
        return self.cfg.projector.anyres

    @property
    def _covered(self) -> int:
        """How many of a tile's pixels are in patches: SigLIP's 384 leave 6 at the end out."""
        vision: Any = self.cfg.vision
        return self.anyres.tile_grid[0] * vision.patch_size

    def processed(
        self, image_processor: Any, tokenizer: Any, images: Sequence[Image.Image]
    ) -> list[ProcessedImage]:
        """Return the images of one prompt, in tiles."""
        alone = len(images) == 1 or not self.anyres.one_tile_of_several
        if alone:
            self._check_resolutions(image_processor, images)
        else:
            check_scaled(images, largest_edge(image_processor), padded=True)
        given = list(images) if alone else [list(images)]
        batch = image_processor(images=given, do_pad=True, return_tensors="pt")
        found = []
        for image, pixels, size in zip(
            images, batch["pixel_values"], batch["image_sizes"].tolist(), strict=True
        ):
            tokens = self._tokens(size, tiled=alone)
            tiles = pixels[: self._n_tiles(size, tiled=alone)]
            check_pixels(tiles, self.cfg)
            visual = {"pixel_values": tiles, "image_sizes": torch.tensor([size])}
            ids = [self.cfg.image_token_id or 0] * tokens.length
            boxes = partial(view_boxes, self.anyres, self._covered, alone)
            found.append(ProcessedImage(visual, ids, replace(tokens, image=image, boxes=boxes)))
        return found

    def _check_resolutions(self, image_processor: Any, images: Sequence[Image.Image]) -> None:
        """Raise a ValueError where the image processor would cut images into other tiles."""
        possible = [tuple(pair) for pair in getattr(image_processor, "image_grid_pinpoints", ())]
        for image in images:
            size = (image.height, image.width)
            expected = Tiling.of(size, self.anyres).resolution
            found = select_best_resolution(size, possible)
            if found != expected:
                raise ValueError(
                    f"the image processor scales an image of {image.width} x {image.height} pixels "
                    f"into {found} (height, width), the model takes it in {expected}: its "
                    f"image_grid_pinpoints must be the model's, {list(self.anyres.resolutions)}"
                )

    def _n_tiles(self, size: Sequence[int], *, tiled: bool) -> int:
        """Return how many tiles the tower gets of an image."""
        return 1 + (math.prod(Tiling.of((size[0], size[1]), self.anyres).tiles) if tiled else 0)

    def _tokens(self, size: Sequence[int], *, tiled: bool) -> ImageTokens:
        """Return one image's tokens: the whole, then line by line, each with its end."""
        base = self.anyres.tile_grid
        whole, end = grid_cells(base), torch.full((1, 3), -1)
        if not tiled:
            return ImageTokens(0, torch.cat([whole, end]), (base,), {len(whole): "newline"})
        rows, cols = grid = Tiling.of((size[0], size[1]), self.anyres).grid
        lines = grid_cells(grid, view=1).view(rows, cols, 3)
        lines = torch.cat([lines, end.expand(rows, 1, 3)], dim=1).flatten(0, 1)
        ends = range(len(whole) + cols, len(whole) + len(lines), cols + 1)
        return ImageTokens(
            0, torch.cat([whole, lines]), (base, grid), dict.fromkeys(ends, "newline")
        )

    def random_image(self, generator: torch.Generator, *, small: bool = False) -> ProcessedImage:
        """Return random tiles, of an image that leaves a part of them empty."""
        few = sorted(self.anyres.resolutions, key=math.prod)
        height, width = few[0 if small else min(1, len(few) - 1)]
        size = (height, max(1, 2 * width // 3))
        vision: Any = self.cfg.vision
        shape = (self._n_tiles(size, tiled=True), vision.n_channels, *vision.image_size)
        pixels = torch.randn(shape, generator=generator)
        tokens = self._tokens(size, tiled=True)
        return ProcessedImage(
            {"pixel_values": pixels, "image_sizes": torch.tensor([size])},
            [self.cfg.image_token_id or 0] * tokens.length,
            tokens,
        )

    def description(self) -> str:
        """How many visual tokens an image has, in words."""
        cfg = self.anyres
        tile = math.prod(cfg.tile_grid)
        most = max(math.prod(pair) for pair in cfg.resolutions) // cfg.tile_size**2
        shrunk = f", shrunk to those of about {cfg.max_tiles}" if cfg.max_tiles else ""
        return f"{tile} of the whole image, and {tile} of each of up to {most} tiles{shrunk}"

    def located(
        self, tokens: Tensor, mask: Tensor, tokenizer: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Visual | None, tuple[ImageTokens, ...]]:
        """Return the tiles, and the images: as many tokens as the size of each asks for."""
        keys = ("pixel_values", "image_sizes")
        check_known(batch, (*keys, "batch_num_images"))
        pixels, sizes = (batch.get(key) for key in keys)
        if (pixels is None) != (sizes is None):
            raise ValueError("pixel_values and image_sizes go together: give both, or neither")
        if sizes is not None and (sizes.shape != (len(sizes), 2) or bool((sizes < 1).any())):
            raise ValueError(
                "image_sizes must be [image, 2], the height and the width of each image in pixels; "
                f"these are {sizes.tolist()}"
            )
        of_rows = batch.get("batch_num_images", torch.ones(0 if sizes is None else len(sizes)))
        tiled = [int(n) == 1 for n in of_rows.tolist() for _ in range(int(n))]
        each = [] if sizes is None else sizes.tolist()
        if len(tiled) != len(each):
            raise ValueError(
                f"batch_num_images counts {len(tiled)} images, but there are {len(each)}"
            )
        found = [self._tokens(size, tiled=it) for size, it in zip(each, tiled, strict=True)]
        places = placed_blocks(tokens, self.cfg.image_token_id, [one.length for one in found])
        images = tuple(
            replace(one, row=row, start=start)
            for one, (row, start) in zip(found, places, strict=True)
        )
        if pixels is None or sizes is None:
            return None, images
        counts = [self._n_tiles(size, tiled=it) for size, it in zip(each, tiled, strict=True)]
        visual = {"pixel_values": self._packed(pixels, counts), "image_sizes": sizes}
        return Visual(
            visual, {"pixel_values": tuple(counts), "image_sizes": (1,) * len(counts)}
        ), images

    def _packed(self, pixels: Tensor, counts: Sequence[int]) -> Tensor:
        """Return all tiles one after the other, without those that pad a batch."""
        if pixels.ndim == 5:
            if len(pixels) != len(counts) or pixels.shape[1] < max(counts, default=0):
                raise ValueError(
                    f"pixel values have shape {tuple(pixels.shape)}, but the images have "
                    f"{list(counts)} tiles"
                )
            pixels = torch.cat([tiles[:n] for tiles, n in zip(pixels, counts, strict=True)])
        check_pixels(pixels, self.cfg)
        if len(pixels) != sum(counts):
            raise ValueError(f"{len(pixels)} tiles, but the images have {list(counts)}")
        return pixels


def view_boxes(cfg: AnyResConfig, covered: int, tiled: bool, size: tuple[int, int]) -> list[Box]:
    """Return what each view shows of an image of that width and height.

    Args:
        cfg: what the tiles are like.
        covered: pixels of a tile's side that are in patches. What every tile leaves out at its end
            is shared among its cells, which are off by half of it at most.
        tiled: whether there are tiles; else the image is padded to a square.
        size: of the image.
    """
    width, height = size
    share = covered / cfg.tile_size
    if not tiled:
        side = max(size)
        left, top = -((side - width) // 2), -((side - height) // 2)
        return [Box(left, top, left + side * share, top + side * share)]
    tiling = Tiling.of((height, width), cfg)
    rows, cols = (n * side for n, side in zip(tiling.tiles, cfg.tile_grid, strict=True))
    full_height, full_width = tiling.resolution
    scale = min(full_width / width, full_height / height)
    new_height = min(math.ceil(height * scale), full_height)
    new_width = min(math.ceil(width * scale), full_width)
    down, across = tiling.kept

    def place(patch: int, n: int, full: int, new: int, side: int) -> float:
        """Where the edge before a patch lies, along one side of the image."""
        left_out = (cfg.tile_size - covered) / 2
        return (patch * full / n - left_out - (full - new) // 2) * side / new

    tiles = Box(
        place(across.start, cols, full_width, new_width, width),
        place(down.start, rows, full_height, new_height, height),
        place(across.stop, cols, full_width, new_width, width),
        place(down.stop, rows, full_height, new_height, height),
    )
    return [Box(0, 0, width * share, height * share), tiles]
