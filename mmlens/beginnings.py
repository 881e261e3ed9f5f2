"""What prompts have in common at their beginning, which then has to be computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmlens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from mmlens.branching import Recording
    from mmlens.model import HookedMultimodalTransformer


def common_prefix(one: MultimodalInputs, other: MultimodalInputs) -> int:
    """How many leading positions are the same in both, in every row: words, pictures and noise.

    One row of noise-free inputs begins like any number of samples.
    """
    n_pos = min(one.n_pos, other.n_pos)
    if len(one) != len(other):
        return 0
    differs = one.tokens[:, :n_pos] != other.tokens[:, :n_pos]
    differs |= one.attention_mask[:, :n_pos] != other.attention_mask[:, :n_pos]
    noises = [each.noise[:, :n_pos] for each in (one, other) if each.noise is not None]
    if len(noises) == 2:
        if len(noises[0]) != len(noises[1]):
            return 0
        noises = [noises[0] - noises[1]]
    if noises:
        differs = differs | (noises[0] != 0).any(dim=-1)
    first = int(differs.any(dim=0).long().argmax()) if bool(differs.any()) else n_pos
    for start, picture in _pictures_at(one):
        for other_start, other_picture in _pictures_at(other):
            if start == other_start and not torch.equal(picture, other_picture):
                first = min(first, start[1])
    return first


def _pictures_at(inputs: MultimodalInputs) -> list[tuple[tuple[int, int], Tensor]]:
    """Every picture, with its row and first position."""
    if inputs.pixel_values is None:
        return []
    where = [(row, start) for row, starts in enumerate(inputs.image_starts) for start in starts]
    return list(zip(where, inputs.pixel_values, strict=True))


def record_like(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    earlier: Sequence[Recording],
    names: Sequence[str] = (),
) -> Recording:
    """Record inputs, from where they differ from the earlier ones that they are most like.

    Unless most of the prompt is the same, they are recorded on their own.
    """
    best = max(earlier, key=lambda one: common_prefix(one.inputs, inputs), default=None)
    from mmlens.branching import Recording

    if best is None or 2 * common_prefix(best.inputs, inputs) < inputs.n_pos:
        return Recording.of(model, inputs, names)
    return best.record(inputs, names)


def record_all(
    model: HookedMultimodalTransformer, inputs: Sequence[MultimodalInputs]
) -> list[Recording]:
    """Record prompts, each from where it differs from an earlier one.

    Several questions on one picture encode and read it once.
    """
    recordings: list[Recording] = []
    for each in inputs:
        recordings.append(record_like(model, each, recordings))
    return recordings
