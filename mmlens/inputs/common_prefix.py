"""`common_prefix`: what two prompts have in common at their beginning, which runs can share."""

from __future__ import annotations

from torch.nn.functional import pad

from mmlens.inputs.attention_blocks import before_blocks
from mmlens.inputs.multimodal_inputs import MultimodalInputs


def common_prefix(one: MultimodalInputs, other: MultimodalInputs) -> int:
    """Return how many leading positions are the same in all rows, and attend to nothing else.

    That is, to words, images and noise that are the same; a block of positions that attend to each
    other is in common as a whole or not at all. One row of noise-free inputs begins like any number
    of samples.
    """
    n_pos = min(one.n_pos, other.n_pos)
    if len(one) != len(other):
        return 0
    differs = one.tokens[:, :n_pos] != other.tokens[:, :n_pos]
    differs |= one.attention_mask[:, :n_pos] != other.attention_mask[:, :n_pos]
    if one.blocks is not None or other.blocks is not None:
        none = one.tokens.new_full((1, 1), -1)
        mine, theirs = (none if each.blocks is None else each.blocks for each in (one, other))
        differs |= mine[:, :n_pos] != theirs[:, :n_pos]
    noises = [each.noise[:, :n_pos] for each in (one, other) if each.noise is not None]
    if len(noises) == 2:
        if len(noises[0]) != len(noises[1]):
            return 0
        wide = max(noise.shape[-1] for noise in noises)
        wide_noises = [pad(noise, (0, wide - noise.shape[-1])) for noise in noises]
        noises = [wide_noises[0] - wide_noises[1]]
    if noises:
        differs = differs | (noises[0] != 0).any(dim=-1)
    first = int(differs.any(dim=0).long().argmax()) if bool(differs.any()) else n_pos
    if one.visual is not None and other.visual is not None:
        for i, image in enumerate(one.images):
            for j, there in enumerate(other.images):
                at_same = (image.row, image.start) == (there.row, there.start)
                if at_same and not one.visual.same(i, other.visual, j):
                    first = min(first, image.start)
    while (before := min(before_blocks(each.blocks, first) for each in (one, other))) < first:
        first = before
    return first
