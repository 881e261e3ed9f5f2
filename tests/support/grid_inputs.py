"""Inputs whose images are one grid each, as LLaVA's, without a model."""

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmlens.inputs.image_tokens import ImageTokens
from mmlens.inputs.layouts.one_grid import OneGrid
from mmlens.inputs.visual import Visual

PATCH = 2
"""Pixels of a patch's side."""


def grid_config(image_token_id: int, grid: tuple[int, int], n_class: int = 0) -> Any:
    """What a layout asks of a configuration."""
    vision = SimpleNamespace(
        grid=grid,
        n_visual_tokens=grid[0] * grid[1] + n_class,
        image_size=(grid[0] * PATCH, grid[1] * PATCH),
        patch_size=PATCH,
        n_channels=3,
    )
    return SimpleNamespace(image_token_id=image_token_id, vision=vision)


def grid_images(
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    image_token_id: int,
    grid: tuple[int, int],
    n_class: int = 0,
    n_images: int | None = None,
) -> tuple[Visual | None, tuple[ImageTokens, ...]]:
    """Return random pixels of `n_images` (by default as the tokens say), and where they stand."""
    cfg = grid_config(image_token_id, grid, n_class)
    if n_images is None:
        n_images = int((tokens == image_token_id).sum()) // cfg.vision.n_visual_tokens
    pixels = {"pixel_values": torch.randn(n_images, 3, *cfg.vision.image_size)} if n_images else {}
    return OneGrid(cfg).located(tokens, mask, None, pixels)
