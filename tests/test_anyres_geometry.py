"""Where a tiled model's visual tokens lie in the image, against what they really depend on.

The tower hands over the embeddings of its patches, which no attention has mixed. Strips of the
image are changed one after the other, columns and then rows; where the strips lie that change a
token, there must its rectangle be.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from anyres_checkpoints import written
from PIL import Image
from torch import Tensor

from mmlens.inputs.image_tokens import Box, ImageTokens
from mmlens.model.transformer import HookedMultimodalTransformer

STRIPS = 48
SIZES = [(64, 64), (90, 31), (25, 97), (17, 19), (300, 200), (211, 640), (8, 5), (120, 118)]


def visual_tokens(model: HookedMultimodalTransformer, images: list[Image.Image]) -> Tensor:
    inputs = model.prepare("what?", images)
    assert inputs.visual is not None and model.vision is not None and model.projector is not None
    return model.projector(model.vision.of_images(inputs.visual), inputs.visual)[0]


def edges(side: int) -> np.ndarray:
    return np.unique(np.linspace(0, side, STRIPS + 1).round().astype(int))


@torch.no_grad()
def centres(
    model: HookedMultimodalTransformer, grey: np.ndarray, axis: int, others: list[Image.Image]
) -> tuple[Tensor, Tensor]:
    """Where along an axis (0: down, 1: across) lies what changes each token, and how much."""
    before = visual_tokens(model, [Image.fromarray(grey), *others])
    ends, changes = edges(grey.shape[axis]), []
    for first, last in pairwise(ends):
        changed = grey.copy()
        if axis == 0:
            changed[first:last] = 255
        else:
            changed[:, first:last] = 255
        after = visual_tokens(model, [Image.fromarray(changed), *others])
        changes.append((after - before).square().sum(dim=-1) / (last - first))
    weight = torch.stack(changes)  # [strip, visual token]
    middles = torch.tensor((ends[:-1] + ends[1:]) / 2, dtype=weight.dtype)
    total = weight.sum(dim=0)
    return (middles[:, None] * weight).sum(dim=0) / total, total


def clipped(box: Box, size: tuple[int, int]) -> Box:
    """The part of a rectangle that lies in the image; its nearest edge where that is none.

    A token of padding depends on pixels at the edge alone, by what resampling mixes.
    """
    return Box(*(min(max(x, 0.0), limit) for x, limit in zip(box, size * 2, strict=True)))


def check(tokens: ImageTokens, across: Tensor, down: Tensor, seen: Tensor, strip: float) -> None:
    """Every token's centre of what it depends on lies in its rectangle, or at most a strip off."""
    n_seen = 0
    for offset, (view, row, col) in enumerate(tokens.cells.tolist()):
        if view < 0:
            assert not seen[offset] > 0  # the end of a line depends on nothing
        elif seen[offset] > 1e-6 * seen.max():  # else it shows padding alone
            whole = tokens.views[view].cell_box(row, col)
            assert tokens.image is not None
            box = clipped(whole, tokens.image.size)
            x, y = float(across[offset]), float(down[offset])
            wide, high = 0.1 * (whole.right - whole.left), 0.1 * (whole.bottom - whole.top)
            assert box.left - wide - strip <= x <= box.right + wide + strip, (view, row, col)
            assert box.top - high - strip <= y <= box.bottom + high + strip, (view, row, col)
            n_seen += 1
    assert n_seen > 0.2 * len(tokens.cells)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["NeXT", "OneVision"])
def test_rectangles_are_where_tokens_look(
    name: str, size: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    model = written(name, tmp_path, feature_layer=0).model
    width, height = size
    grey = np.random.randint(90, 110, (height, width, 3), dtype=np.uint8)
    several = name == "OneVision" and random.random() < 0.5
    others = [Image.new("RGB", (9, 7))] * several
    tokens = model.prepare("what?", [Image.fromarray(grey), *others]).images[0]
    assert len(tokens.views) == (1 if several else 2)
    n = tokens.length
    (across, seen_across), (down, seen_down) = (
        centres(model, grey, axis, others) for axis in (1, 0)
    )
    seen = torch.minimum(seen_across, seen_down)
    check(tokens, across[:n], down[:n], seen[:n], strip=max(size) / STRIPS / 2 + 0.5)
