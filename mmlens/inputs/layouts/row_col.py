r"""`RowCol`: an image in tiles, each after text that says which it is, and then the whole of it.

    <fake_token_around_image><row_1_col_1><image> ... <image><fake_token_around_image><row_1_col_2>
    ... \n\n<fake_token_around_image><global-img><image> ... <image><fake_token_around_image>

That is how Idefics3 and SmolVLM see an image; a small one is seen whole only. Sources: Laurençon et
al. 2024, "Building and better understanding vision-language models", 4.2; transformers,
`processing_idefics3.py` and `image_processing_idefics3.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmlens.config import MultimodalConfig
from mmlens.inputs.checks import check_images, image_positions, shortened
from mmlens.inputs.image_tokens import Box, Grid, ImageTokens, grid_cells
from mmlens.inputs.layouts.layout import ProcessedImage, check_known, check_pixels
from mmlens.inputs.spans import PLACEHOLDER
from mmlens.inputs.visual import Visual

FENCE, WHOLE = "<fake_token_around_image>", "<global-img>"
TAG = re.compile(r"<row_(\d+)_col_(\d+)>")
LONGEST_TAG = 32
"""Ids of a tag and of what is before it, where a tokenizer takes it for text."""


@dataclass(frozen=True)
class RowCol:
    """View 0 is the whole image, whose tokens come last; views 1, 2, ... are the tiles in order."""

    cfg: MultimodalConfig

    def processed(
        self, image_processor: Any, tokenizer: Any, images: Sequence[Image.Image]
    ) -> list[ProcessedImage]:
        """Return the images of one prompt: tiles and the whole, with the ids of the text between.

        Raises:
            ValueError: the image processor gives what the model does not take.
        """
        batch = image_processor(
            images=[list(images)], return_row_col_info=True, return_tensors="pt"
        )
        pixels = batch["pixel_values"][0]
        tilings = list(zip(batch["rows"][0], batch["cols"][0], strict=True))
        counts = [rows * cols + 1 for rows, cols in tilings]
        masks = batch.get("pixel_attention_mask")
        seen = _seen(pixels, None if masks is None else masks[0])
        grid, found = tile_grid(pixels, self.cfg), []
        for image, tiling, tiles, mask in zip(
            images, tilings, pixels.split(counts), seen.split(counts), strict=True
        ):
            visual = {"pixel_values": tiles, "pixel_attention_mask": mask}
            ids = self._ids(tokenizer, tiling, grid)
            boxes = partial(view_boxes, tiling, covered_part(pixels, self.cfg))
            tokens = replace(self._tokens(ids, tiling, grid), image=image, boxes=boxes)
            found.append(ProcessedImage(visual, ids, tokens))
        return found

    def random_image(self, generator: torch.Generator, *, small: bool = False) -> ProcessedImage:
        """Return random pixels of one tile, as transformers has them: [1, 1, channel, ...].

        An image that is seen whole; the text before it is left out.
        """
        vision: Any = self.cfg.vision
        factor = self.cfg.projector.pixel_shuffle if self.cfg.projector else 1
        sides = (2 * factor * vision.patch_size,) * 2 if small else vision.image_size
        pixels = torch.randn(1, vision.n_channels, *sides, generator=generator)
        grid = tile_grid(pixels, self.cfg)
        ids = [self.cfg.image_token_id or 0] * math.prod(grid)
        return ProcessedImage({"pixel_values": pixels[None]}, ids, self._tokens(ids, (0, 0), grid))

    def description(self) -> str:
        """How many visual tokens an image has, in words."""
        return f"{self.cfg.mm_tokens_per_image} of each tile, and of the whole image"

    def _ids(self, tokenizer: Any, tiling: Grid, grid: Grid) -> list[int]:
        """Return the ids of an image's text with its visual tokens."""
        ids = tokenizer(image_text(tiling), add_special_tokens=False, verbose=False)["input_ids"]
        image_token, n = self.cfg.image_token_id, math.prod(grid)
        return [each for token in ids for each in [token] * (n if token == image_token else 1)]

    def _tokens(self, ids: Sequence[int], tiling: Grid, grid: Grid) -> ImageTokens:
        """Return one image's tokens, with separators between the tiles."""
        views = [*range(1, math.prod(tiling) + 1), 0]
        cells = torch.full((len(ids), 3), -1)
        visual = torch.tensor(ids) == self.cfg.image_token_id
        cells[visual] = torch.cat([grid_cells(grid, view) for view in views])
        return ImageTokens(0, cells, (grid,) * len(views))

    def located(
        self, tokens: Tensor, mask: Tensor, tokenizer: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Visual | None, tuple[ImageTokens, ...]]:
        """Return the tiles, and the images: what the text before each block of tokens says."""
        check_known(batch, ("pixel_values", "pixel_attention_mask"))
        image_token, pixels = self.cfg.image_token_id, batch.get("pixel_values")
        if pixels is None:
            check_images(tokens, mask, None, image_token_id=image_token, n_visual_tokens=0)
            return None, ()
        grid = tile_grid(pixels.flatten(0, 1) if pixels.ndim == 5 else pixels, self.cfg)
        n_tiles, images = [], []
        for number, ids in enumerate(tokens.tolist()):
            starts = self._tile_starts(tokens[number], number, math.prod(grid))
            n_tiles.append(len(starts))
            for start, stop, tiling in found_images(ids, starts, math.prod(grid), tokenizer):
                one = self._tokens(ids[start:stop], tiling, grid)
                images.append(replace(one, row=number, start=start))
        masks = _seen(pixels, batch.get("pixel_attention_mask"))
        if pixels.ndim == 5:
            pixels, masks = unpadded(pixels, masks, n_tiles)
        if len(pixels) != sum(n_tiles):
            raise ValueError(f"{len(pixels)} tiles, but tokens of {' + '.join(map(str, n_tiles))}")
        counts = tuple(len(image.grids) for image in images)
        return Visual(
            {"pixel_values": pixels, "pixel_attention_mask": masks},
            {"pixel_values": counts, "pixel_attention_mask": counts},
        ), tuple(images)

    def _tile_starts(self, ids: Tensor, number: int, n: int) -> list[int]:
        """Return the first positions of blocks of n visual tokens without a gap."""
        at = image_positions(ids, self.cfg.image_token_id).nonzero().flatten().cpu()
        blocks = at[: len(at) // n * n].view(-1, n)
        if len(at) % n or bool((blocks[:, -1] - blocks[:, 0] != n - 1).any()):
            raise ValueError(
                f"the image tokens of row {number} stand at {shortened(at)}: each tile of an image "
                f"has {n} of them without a gap"
            )
        return blocks[:, 0].tolist()


def tile_grid(pixels: Tensor, cfg: MultimodalConfig) -> Grid:
    """Return rows and columns of a tile's visual tokens.

    Args:
        pixels: [tile, channel, height, width].
        cfg: of the model.

    Raises:
        ValueError: tiles that are not square, or whose patches cannot be put together.
    """
    rows, cols = check_pixels(pixels, cfg, any_size=True)
    factor = cfg.projector.pixel_shuffle if cfg.projector else 1
    if rows != cols or rows % factor:
        raise ValueError(
            f"tiles of {rows} x {cols} patches; this model puts {factor} x {factor} of them "
            "together, and takes square tiles that are so divided"
        )
    return rows // factor, cols // factor


def covered_part(pixels: Tensor, cfg: MultimodalConfig) -> tuple[float, float]:
    """Return which part of a tile's height and width the patches cover, without the strip."""
    patch = cfg.vision.patch_size if cfg.vision else 1
    height, width = pixels.shape[-2:]
    return height // patch * patch / height, width // patch * patch / width


def found_images(
    ids: Sequence[int], starts: Sequence[int], n: int, tokenizer: Any
) -> list[tuple[int, int, Grid]]:
    """Return start, end and rows x columns of tiles of the images of a row.

    A block of visual tokens without text that says which one it is shows a whole image.

    Args:
        ids: of the row.
        starts: where its blocks of visual tokens begin.
        n: how many tokens each has.
        tokenizer: reads the text before each.

    Raises:
        ValueError: tiles out of order, or without the whole image after them; or no tokenizer.
    """
    if tokenizer is None:
        if len(starts) > 2:  # an image in tiles has two at least, and the whole
            raise ValueError(
                f"a row has {len(starts)} blocks of image tokens, and the text before each says "
                "which tile it is, but the model has no tokenizer to read it: set model.tokenizer"
            )
        return [(start, start + n, (0, 0)) for start in starts]
    fence = tokenizer.convert_tokens_to_ids(FENCE)
    found: list[tuple[int, int, Grid]] = []
    tiles: list[Grid] = []
    begin = 0
    for before, start in pairwise([-n, *starts]):
        between = ids[max(before + n, start - LONGEST_TAG) : start]
        length = between[::-1].index(fence) if fence in between else 0
        text = tokenizer.decode(between[len(between) - length :]).strip()
        tag = TAG.fullmatch(text)
        fenced = tag is not None or text == WHOLE
        if not tiles:
            begin = start - (length + 1) * fenced
        if tag:
            tiles.append((int(tag[1]), int(tag[2])))
            continue
        tiling = tiles[-1] if tiles else (0, 0)
        check_order(tiles, tiling)
        stop = start + n
        found.append((begin, stop + (fenced and ids[stop : stop + 1] == [fence]), tiling))
        tiles = []
    check_order(tiles, (0, 0))
    return found


def image_text(tiling: Grid) -> str:
    """Return what stands for an image in a prompt, with one placeholder for each tile."""
    rows, cols = tiling
    lines = [
        "".join(f"{FENCE}<row_{row + 1}_col_{col + 1}>{PLACEHOLDER}" for col in range(cols)) + "\n"
        for row in range(rows)
    ]
    tiles = "".join(lines) + "\n" if rows else ""
    return f"{tiles}{FENCE}{WHOLE}{PLACEHOLDER}{FENCE}"


def view_boxes(tiling: Grid, shown: tuple[float, float], size: tuple[int, int]) -> list[Box]:
    """Return what each view shows of an image of that width and height: the whole, then tiles.

    Args:
        tiling: rows and columns of tiles; 0 where there are none.
        shown: which part of a tile's height and width its patches cover.
        size: of the image.
    """
    width, height = size
    boxes = [Box(0, 0, width * shown[1], height * shown[0])]
    rows, cols = tiling
    for row, col in product(range(rows), range(cols)):
        left, top = col * width / cols, row * height / rows
        right, bottom = left + width / cols * shown[1], top + height / rows * shown[0]
        boxes.append(Box(left, top, right, bottom))
    return boxes


def check_order(tiles: Sequence[Grid], tiling: Grid) -> None:
    """Raise a ValueError unless tiles (row, column, from 1) are those of a tiling, row by row."""
    rows, cols = tiling
    if list(tiles) != list(product(range(1, rows + 1), range(1, cols + 1))):
        raise ValueError(
            f"the tiles of an image are {list(tiles)} (row, column); before the whole image there "
            f"must be those of {rows} x {cols}, row by row"
        )


def _seen(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """Return where tiles are no padding: everywhere, unless a mask says otherwise."""
    shape = (*pixels.shape[:-3], *pixels.shape[-2:])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=pixels.device)
    if mask.shape != shape:
        raise ValueError(
            f"pixel_attention_mask has shape {tuple(mask.shape)}, but the pixel values "
            f"{tuple(pixels.shape)}: it must be {shape}"
        )
    return mask.bool()


def unpadded(pixels: Tensor, masks: Tensor, n_tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return pixels and masks of all tiles one after the other, without those that pad a batch.

    Args:
        pixels: [batch, tile, channel, height, width]; tiles of zeros fill shorter rows.
        masks: [batch, tile, height, width].
        n_tiles: of each row.

    Raises:
        ValueError: other numbers of rows or tiles.
    """
    padded = [bool(row[n:].any()) for row, n in zip(pixels, n_tiles, strict=False)]
    if len(pixels) != len(n_tiles) or pixels.shape[1] < max(n_tiles) or any(padded):
        raise ValueError(
            f"pixel values of shape {tuple(pixels.shape)} for rows whose tokens are of "
            f"{list(n_tiles)} tiles"
        )
    pairs = zip(pixels, masks, n_tiles, strict=True)
    tiles, seen = zip(*((row[:n], mask[:n]) for row, mask, n in pairs), strict=True)
    return torch.cat(tiles), torch.cat(seen)
