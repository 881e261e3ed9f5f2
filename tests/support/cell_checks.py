"""Checks of where the cells of visual tokens lie in an image, for models of tiles."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image

from mmlens.inputs.image_tokens import Box
from mmlens.inputs.visual import Visual
from mmlens.model.transformer import HookedMultimodalTransformer


@torch.no_grad()
def without_attention(model: HookedMultimodalTransformer) -> None:
    """Silence the tower's attention: each feature then depends on its own patch's pixels alone."""
    for block in model.vision.blocks:
        block.attn.W_O.zero_()
        if block.attn.o.bias is not None:
            block.attn.o.bias.zero_()


@torch.no_grad()
def check_cells(
    model: HookedMultimodalTransformer,
    size: tuple[int, int],
    unit: int,
    n_tokens: int,
    chance: random.Random,
) -> None:
    """Assert that the cell of a visual token covers the pixels that the token depends on.

    Of squares all over the image, each changed alone, the one that moves a token most lies in its
    cell, in every view. The tower's attention is silenced.

    Args:
        model: whose images are a whole and tiles.
        size: the image's, in pixels.
        unit: of which a square's side is a twentieth.
        n_tokens: visual tokens of a view.
        chance: of black and white.
    """
    without_attention(model)
    assert model.projector is not None
    width, height = size
    plain = np.full((height, width, 3), 128, dtype=np.uint8)
    (tokens,) = model.prepare("Which?", Image.fromarray(plain)).images
    squares = [
        view.cell_box(row, col)
        for view in tokens.views[1:]
        for row in range(view.grid[0])
        for col in range(view.grid[1])
    ]
    images = [Image.fromarray(plain)]
    for box in squares:
        changed = plain.copy()
        middle = (box.top + box.bottom) / 2, (box.left + box.right) / 2
        y, x = (slice(int(at - unit / 40), int(at + unit / 40) + 1) for at in middle)
        changed[y, x] = chance.choice([0, 255])
        images.append(Image.fromarray(changed))
    processed = model.processor.layout.processed(model.image_processor, model.tokenizer, images)
    visual = Visual.joined([Visual.of_one(one.visual) for one in processed])
    assert visual is not None
    found = model.projector(model.vision.of_images(visual), visual)[0]
    found = found.unflatten(0, (len(images), -1))
    moved = (found[1:] - found[:1]).norm(dim=-1)  # [square, token]
    cells = tokens.cells[tokens.is_visual].tolist()
    assert len(tokens.views) > 2
    assert len(cells) == moved.shape[1] == n_tokens * len(tokens.views)
    for (view, row, col), most in zip(cells, moved.argmax(dim=0).tolist(), strict=True):
        box, square = tokens.views[view].cell_box(row, col), squares[most]
        assert box == square if view else near(box, square), (view, row, col)


def near(box: Box, square: Box) -> bool:
    """Whether the middle of a square lies in a box, or a tenth of its side beyond."""
    x, y = (square.left + square.right) / 2, (square.top + square.bottom) / 2
    width, height = 0.1 * (box.right - box.left), 0.1 * (box.bottom - box.top)
    return (
        box.left - width <= x <= box.right + width and box.top - height <= y <= box.bottom + height
    )
