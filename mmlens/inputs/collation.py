"""`collate`: one batch from several inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.position_labels import PAD_LABEL
from mmlens.inputs.visual import Visual

T = TypeVar("T")


def collate(inputs: Sequence[MultimodalInputs], pad_token_id: int) -> MultimodalInputs:
    """Join several inputs to one batch, padded on the left; spans move with their tokens.

    What only some of them have (`texts`, `str_tokens`, `char_spans`) is dropped, missing `noise` is
    zero.

    Raises:
        ValueError: nothing to collate, models with other image tokens, pixels of other shapes, the
            image token as padding, several samples of noise.
    """
    if not inputs:
        raise ValueError("nothing to collate: the list of inputs is empty")
    with_images = [one for one in inputs if one.visual is not None] or list(inputs[:1])
    check_same("image_token_id", [one.image_token_id for one in with_images])
    image_token_id = with_images[0].image_token_id
    if pad_token_id == image_token_id:
        raise ValueError(f"pad_token_id={pad_token_id} is the image token: padding would be images")
    n_pos = max(one.n_pos for one in inputs)
    missing = [n_pos - one.n_pos for one in inputs]
    left = list(zip(inputs, missing, strict=True))
    first_rows = accumulate((len(one) for one in inputs), initial=0)
    return MultimodalInputs(
        tokens=torch.cat([pad(one.tokens, (n, 0), value=pad_token_id) for one, n in left]),
        attention_mask=torch.cat([pad(one.attention_mask, (n, 0)) for one, n in left]),
        visual=Visual.joined([one.visual for one in inputs if one.visual is not None]),
        spans=tuple(
            {name: at + n for name, at in row.items()} for one, n in left for row in one.spans
        ),
        images=tuple(
            replace(image, start=image.start + n, row=image.row + row)
            for (one, n), row in zip(left, first_rows, strict=False)
            for image in one.images
        ),
        image_token_id=image_token_id,
        str_tokens=joined_rows(
            None if one.str_tokens is None else [[PAD_LABEL] * n + row for row in one.str_tokens]
            for one, n in left
        ),
        texts=joined_rows(one.texts for one in inputs),
        char_spans=joined_rows(one.char_spans for one in inputs),
        blocks=padded_blocks([(one.blocks, one.tokens, n) for one, n in left]),
        noise=padded_noise([(one.noise, one.tokens, n) for one, n in left]),
    )


def check_same(name: str, values: Sequence[object]) -> None:
    """Raise a ValueError unless all inputs of a batch have the same value."""
    if len({str(value) for value in values}) > 1:
        raise ValueError(f"inputs of one batch must share their {name}; these have {list(values)}")


def joined_rows(parts: Iterable[Sequence[T] | None]) -> tuple[T, ...] | None:
    """Return the rows of all parts, or None where a part has none."""
    rows: list[T] = []
    for part in parts:
        if part is None:
            return None
        rows.extend(part)
    return tuple(rows)


def padded_blocks(
    parts: Sequence[tuple[Tensor | None, Tensor, int]],
) -> Int[Tensor, "row padded"] | None:
    """Return the blocks of several inputs; at padding, and where one has none, -1 stands.

    Args:
        parts: of each, its blocks [batch, pos], its tokens [batch, pos], and how many positions of
            padding it gets.
    """
    if all(blocks is None for blocks, _, _ in parts):
        return None
    each = (
        (torch.full_like(tokens, -1) if blocks is None else blocks, n)
        for blocks, tokens, n in parts
    )
    return torch.cat([pad(blocks, (n, 0), value=-1) for blocks, n in each])


def padded_noise(
    parts: Sequence[tuple[Tensor | None, Tensor, int]],
) -> Float[Tensor, "row padded d_model"] | None:
    """Return the noise of several inputs: zero where one has none, and at its left padding.

    Args:
        parts: of each, its noise [sample, pos, d_model], its tokens [batch, pos], and how many
            positions of padding it gets.

    Raises:
        ValueError: noise of several models, or several samples for one row.
    """
    noises = [noise for noise, _, _ in parts if noise is not None]
    if not noises:
        return None
    check_same("width of noise", [noise.shape[-1] for noise in noises])
    if len(parts) > 1 and any(
        len(noise) != len(tokens) for noise, tokens, _ in parts if noise is not None
    ):
        raise ValueError("inputs with several samples of noise cannot be part of a larger batch")
    zero = [(*tokens.shape, noises[0].shape[-1]) for _, tokens, _ in parts]
    return torch.cat(
        [
            pad(
                tokens.new_zeros(shape, dtype=torch.float32) if noise is None else noise,
                (0, 0, n, 0),
            )
            for (noise, tokens, n), shape in zip(parts, zero, strict=True)
        ]
    )
