"""Rotary positions of a batch: counted, or of three axes where images have rows and columns.

M-RoPE (Wang et al. 2024, "Qwen2-VL", 2.1) gives every token a position on three axes: time, row
and column. A word has the same on all three, one more than the largest before it. The tokens of an
image share the time; their rows and columns go on from there. So after an image of r x c cells the
count goes on max(r, c) later, and not r * c.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmlens.inputs.image_tokens import ImageTokens


def counted(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Return the number of real tokens before each position; 0 at the left padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def rope_positions(
    mask: Bool[Tensor, "batch pos"], images: Sequence[ImageTokens]
) -> Int[Tensor, "axis batch pos"]:
    """Return the rotary positions of all tokens.

    Args:
        mask: False at the padding, which has position 0.
        images: of all rows. Where none has `mrope`, there is one axis.
    """
    positions = counted(mask)[None]
    placed = sorted((image for image in images if image.mrope), key=lambda image: image.start)
    if not placed:
        return positions
    positions = positions.repeat(3, 1, 1)
    for image in placed:
        end = image.start + image.length
        first = positions[:, image.row, image.start].clone()
        rest = positions[:, image.row, end:]
        rest += max(image.grids[0]) - image.length  # what comes after goes on from the largest
        places = torch.cat([torch.zeros(image.length, 1), image.cells[:, 1:]], dim=1)
        positions[:, image.row, image.start : end] = first[:, None] + places.T.to(positions)
    return positions
