"""Small random models that see an image whole and in tiles, without checkpoint files."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from small_models import small_config
from small_tokenizers import small_tokenizer
from transformers import LlavaNextImageProcessor, LlavaOnevisionImageProcessor

from mmlens.config import AnyResConfig
from mmlens.model.transformer import HookedMultimodalTransformer

PATCH = 4


def tiled_model(
    seed: int,
    side: int = 3,
    *,
    onevision: bool = False,
    resolutions: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1)),
    n_ctx: int = 4096,
) -> HookedMultimodalTransformer:
    """A random model with a tokenizer and transformers' image processor of that family.

    Args:
        seed: of the sizes and the weights.
        side: patches on a side of a tile.
        onevision: shrinks the features of many tiles, and sees several images whole only.
        resolutions: rows and columns of tiles.
        n_ctx: positions.
    """
    tokenizer = small_tokenizer("bytes")
    cfg = small_config(
        random.Random(seed),
        d_vocab=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        bos_token_id=tokenizer.bos_token_id,
    )
    assert cfg.vision is not None and cfg.projector is not None
    pixels = side * PATCH
    scaled = tuple((rows * pixels, cols * pixels) for rows, cols in resolutions)
    tiles = AnyResConfig(
        resolutions=scaled,
        tile_size=pixels,
        tile_grid=(side, side),
        max_tiles=2 if onevision else None,
        one_tile_of_several=onevision,
    )
    cfg.n_ctx, cfg.image_layout = n_ctx, "anyres"
    cfg.vision = replace(cfg.vision, image_size=(pixels, pixels), select="default")
    cfg.projector = replace(cfg.projector, anyres=tiles)
    model = HookedMultimodalTransformer(cfg)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    square = {"height": pixels, "width": pixels}
    grids = [list(size) for size in scaled]
    model.image_processor = (
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grids)
        if onevision
        else LlavaNextImageProcessor(
            size={"shortest_edge": pixels}, crop_size=square, image_grid_pinpoints=grids
        )
    )
    model.tokenizer = tokenizer
    return model.requires_grad_(False)


def noise_picture(seed: int, width: int, height: int) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
