"""Which positions attend to each other in both directions, as inputs carry it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad


def attention_blocks(
    kind: Literal["image", "prompt"] | None,
    is_image: Bool[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    follows: Bool[Tensor, "batch pos"] | None = None,
) -> Int[Tensor, "batch pos"] | None:
    """Return the number of each position's block, -1 where it is in none; None without blocks.

    Args:
        kind: the model's `cfg.attention_blocks`: each run of visual tokens without a gap is one
            (as in transformers, `get_block_sequence_ids_for_mask` of `modeling_gemma3.py`), or the
            prompt is (`modeling_paligemma.py`).
        is_image: True at visual tokens.
        mask: False at padding.
        follows: True at what comes after the prompt: an answer.
    """
    if kind == "image" and bool(is_image.any()):
        begins = is_image & ~pad(is_image, (1, 0))[:, :-1]
        return torch.where(is_image, begins.long().cumsum(dim=1) - 1, -1)
    if kind == "prompt":
        return torch.where(mask if follows is None else mask & ~follows, 0, -1)
    return None


def before_blocks(blocks: Int[Tensor, "batch pos"] | None, position: int) -> int:
    """Return the last position, up to the given one, before which no block of any row goes on.

    What is computed before it depends on nothing after it.
    """
    if blocks is None or position >= blocks.shape[1]:
        return position
    goes_on = (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0)
    free = [True, *(~goes_on.any(dim=0)).tolist()]
    return max(at for at in range(position + 1) if free[at])
