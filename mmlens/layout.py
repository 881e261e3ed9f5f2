"""Where images and padding lie in rows of tokens, and what is wrong where they cannot.

Every check raises a ValueError that says what was found and what would work. Nothing here knows
`MultimodalInputs`: these are functions of tokens and masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Sized
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

RESERVED_SPANS = ("image", "text", "bos", "last")
"""Names that are always filled from the tokens, and so are not the user's to give (nor `image_0`,
`image_1`, ...)."""

PAD_LABEL = "<pad>"

T = TypeVar("T")


def image_positions(
    tokens: Int[Tensor, "*batch pos"], image_token_id: int | None
) -> Bool[Tensor, "*batch pos"]:
    """True where a visual token stands."""
    if image_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return tokens == image_token_id


def image_starts(visual: Bool[Tensor, " pos"], n_visual_tokens: int) -> tuple[int, ...]:
    """First position of each image of one row.

    Raises:
        ValueError: visual tokens that are not whole images of `n_visual_tokens` in one piece each.
    """
    positions = visual.nonzero().flatten()
    if not len(positions):
        return ()
    if n_visual_tokens < 1 or len(positions) % n_visual_tokens:
        raise ValueError(
            f"a row holds {len(positions)} image token(s), which is no whole number of images: one "
            f"image has {n_visual_tokens} visual tokens, and `tokens` has one entry for each "
            f"(`model.prepare` and Hugging Face's processors repeat the <image> token so)"
        )
    blocks = positions.view(-1, n_visual_tokens)
    if (blocks[:, -1] - blocks[:, 0] != n_visual_tokens - 1).any():
        raise ValueError(
            f"the image tokens of a row are not in blocks of {n_visual_tokens} without a gap: "
            f"they stand at {shortened(positions)}"
        )
    return tuple(blocks[:, 0].tolist())


def standard_spans(
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"],
    *,
    image_token_id: int | None,
    n_visual_tokens: int,
    bos_token_id: int | None,
) -> tuple[dict[str, Int[Tensor, " _"]], ...]:
    """The spans that follow from the tokens alone: `image`, `image_0` ..., `text`, `bos`, `last`.

    Raises:
        ValueError: visual tokens that are no whole number of images.
    """
    spans = []
    for row, real in zip(tokens, attention_mask, strict=True):
        named: dict[str, Tensor] = {}
        visual = image_positions(row, image_token_id)
        if visual.any():
            starts = image_starts(visual.cpu(), n_visual_tokens)
            named["image"] = visual.nonzero().flatten()
            for i, start in enumerate(starts):
                named[f"image_{i}"] = torch.arange(start, start + n_visual_tokens).to(row.device)
        text = (real & ~visual).nonzero().flatten()
        if bos_token_id is not None and len(text) and row[real][0] == bos_token_id:
            named["bos"], text = text[:1], text[1:]
        named["text"] = text
        named["last"] = real.nonzero().flatten()[-1:]
        spans.append(named)
    return tuple(spans)


def check_span_name(name: str) -> None:
    """Raise a ValueError if `name` is one that the inputs fill themselves."""
    if name in RESERVED_SPANS or re.fullmatch(r"image_\d+", name):
        raise ValueError(
            f"a span cannot be called {name!r}: the names {', '.join(RESERVED_SPANS)} and image_0, "
            f"image_1, ... are filled from the tokens. Call it something else, e.g. 'constraint'"
        )


def check_one_prompt(n_rows: int, name: str) -> None:
    """Raise a ValueError for a batch, in whose rows a span may have other positions."""
    if n_rows != 1:
        raise ValueError(f"{name} takes one prompt at a time; this batch has {n_rows}")


def check_devices(tokens: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError unless all are on the device of the tokens."""
    for name, value in others.items():
        if value is not None and value.device != tokens.device:
            raise ValueError(
                f"{name} is on {value.device}, the tokens on {tokens.device}: move it there with "
                f"`.to({str(tokens.device)!r})` (`inputs.to(device)` moves everything)"
            )


def check_mask(tokens: Tensor, attention_mask: Tensor) -> None:
    """Raise a ValueError unless the mask fits the tokens and all padding is on the left."""
    if tokens.ndim != 2 or attention_mask.shape != tokens.shape:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)} and attention_mask "
            f"{tuple(attention_mask.shape)}; both must be [batch, pos]"
        )
    if not tokens.numel():
        raise ValueError(f"there are no tokens: their shape is {tuple(tokens.shape)}")
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be of bools, not {attention_mask.dtype}")
    gaps = (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any(-1) | ~attention_mask[:, -1]
    if gaps.any():
        row = int(gaps.nonzero()[0])
        padding = (~attention_mask[row]).nonzero().flatten()
        raise ValueError(
            f"the mask of row {row} is not left padding: positions {shortened(padding)} of "
            f"{tokens.shape[1]} are masked, and only those before the first real token can be. "
            f"Tokenise with padding_side='left', or use `model.prepare` or `collate`"
        )


def check_images(
    tokens: Tensor,
    attention_mask: Tensor,
    n_images: int | None,
    *,
    image_token_id: int | None,
    n_visual_tokens: int,
) -> None:
    """Raise a ValueError unless the image tokens are those of `n_images` (None: no pixels)."""
    visual = image_positions(tokens, image_token_id)
    if (visual & ~attention_mask).any():
        raise ValueError(f"the padding holds image tokens ({image_token_id}): pad with another id")
    n_tokens = int(visual.sum())
    if n_images is None:
        if n_tokens:
            raise ValueError(
                f"tokens hold {n_tokens} image tokens (id {image_token_id}), but there are no "
                f"pixel values; give pixel_values, or leave the image tokens out"
            )
        return
    if not n_tokens:
        raise ValueError(
            f"there are pixel values of {n_images} image(s), but tokens hold no image token "
            f"(id {image_token_id}); put {n_visual_tokens} of them where each image belongs"
        )
    if n_tokens != n_images * n_visual_tokens:
        raise ValueError(
            f"tokens hold {n_tokens} image tokens (id {image_token_id}), but {n_images} image(s) "
            f"have {n_images} x {n_visual_tokens} = {n_images * n_visual_tokens} visual tokens; "
            f"`tokens` must hold one entry for each (`model.prepare` does it)"
        )
    for row in visual.cpu():
        image_starts(row, n_visual_tokens)


def check_spans(spans: Sequence[dict[str, Tensor]], attention_mask: Tensor) -> None:
    """Raise a ValueError unless there is one dict per row, of real positions."""
    batch, n_pos = attention_mask.shape
    check_rows("spans", spans, batch)
    for row, named in enumerate(spans):
        for name, at in named.items():
            if at.ndim != 1 or at.dtype != torch.long:
                raise ValueError(
                    f"span {name!r} must be a LongTensor of positions, not {at.dtype} "
                    f"{tuple(at.shape)}"
                )
            if not at.numel():
                continue
            if at.min() < 0 or at.max() >= n_pos:
                raise ValueError(
                    f"span {name!r} of row {row} has positions {shortened(at)}, but there are only "
                    f"0 ... {n_pos - 1}"
                )
            if not attention_mask[row, at].all():
                raise ValueError(
                    f"span {name!r} of row {row} has positions {shortened(at)}, some of them in "
                    f"the padding; the row begins at {int((~attention_mask[row]).sum())}"
                )


def check_str_tokens(str_tokens: Sequence[Sequence[str]] | None, tokens: Tensor) -> None:
    """Raise a ValueError unless every position has its text."""
    check_rows("str_tokens", str_tokens, tokens.shape[0])
    for row in str_tokens or ():
        if len(row) != tokens.shape[1]:
            raise ValueError(
                f"str_tokens has a row of {len(row)} texts for {tokens.shape[1]} positions"
            )


def check_noise(noise: Tensor | None, tokens: Tensor) -> None:
    """Raise a ValueError unless the noise has a vector for every position."""
    if noise is None:
        return
    batch, n_pos = tokens.shape
    if noise.ndim != 3 or noise.shape[1] != n_pos or (batch > 1 and len(noise) != batch):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; it must be [sample, pos, d_model] with "
            f"pos={n_pos}, and for a batch of {batch} rows one sample per row (a single row may "
            f"have any number of samples)"
        )


def check_pictures(images: Sized | None, pixel_values: Tensor | None) -> None:
    """Raise a ValueError unless every picture has its pixel values."""
    n_images = 0 if pixel_values is None else pixel_values.shape[0]
    if images is not None and len(images) != n_images:
        raise ValueError(f"{len(images)} pictures, but pixel values of {n_images}")


def check_grid(grid_size: tuple[int, int] | None, n_visual_tokens: int) -> None:
    """Raise a ValueError unless an image has as many tokens as patches, or one more or less."""
    if grid_size is None:
        return
    n_patches = grid_size[0] * grid_size[1]
    if abs(n_visual_tokens - n_patches) > 1:
        raise ValueError(
            f"{n_visual_tokens} visual tokens per image do not fit a grid of {grid_size[0]} x "
            f"{grid_size[1]} patches: there must be {n_patches}, {n_patches + 1} with a class "
            f"token, or {n_patches - 1} without the first patch"
        )


def check_rows(name: str, rows: Sized | None, batch: int) -> None:
    """Raise a ValueError if there is not one entry per row of the batch."""
    if rows is not None and len(rows) != batch:
        raise ValueError(f"{name} has {len(rows)} entries for a batch of {batch} row(s)")


def shortened(positions: Tensor) -> str:
    """Positions for a message: `[3, 4, 5, ..., 99]`."""
    values = positions.tolist()
    if len(values) <= 8:
        return str(values)
    return f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


def position_labels(
    texts: Sequence[str], real: Sequence[bool], grid: Sequence[Sequence[int]], *, several: bool
) -> list[str]:
    """Label the positions of one row: `<img 3,5>` for visual tokens, else the token's text.

    Args:
        texts: of every position.
        real: False at padding.
        grid: (image, row, column) of every position, -1 where there is none.
        several: whether the label must say which image.
    """
    labels = []
    for text, is_real, (image, row, col) in zip(texts, real, grid, strict=True):
        if image >= 0:
            place = f"{row},{col}" if row >= 0 else "cls"
            labels.append(f"<img{image if several else ''} {place}>")
        else:
            labels.append(text.replace("\n", "\\n") if is_real else PAD_LABEL)
    return labels


def appended_strings(
    old: Sequence[list[str]] | None,
    tokens: Sequence[Sequence[int]],
    texts: Sequence[str] | Sequence[Sequence[str]] | None,
) -> tuple[list[str], ...] | None:
    """`str_tokens` of rows after tokens were appended; `[id]` where their text is not known."""
    if old is None:
        return None
    if texts is None:
        new: list[list[str]] = [[f"[{token}]" for token in row] for row in tokens]
    elif all(isinstance(text, str) for text in texts):
        new = [[str(text) for text in texts]] * len(old)
    else:
        new = [list(row) for row in texts]
    check_rows("str_tokens", new, len(old))
    return tuple([*before, *after] for before, after in zip(old, new, strict=True))


def check_same(name: str, values: Sequence[object]) -> None:
    """Raise a ValueError unless all inputs of a batch have the same value."""
    if len({str(value) for value in values}) > 1:
        raise ValueError(f"inputs of one batch must share their {name}; these have {list(values)}")


def joined_rows(parts: Iterable[Sequence[T] | None]) -> tuple[T, ...] | None:
    """The rows of all parts, or None where a part has none."""
    rows: list[T] = []
    for part in parts:
        if part is None:
            return None
        rows.extend(part)
    return tuple(rows)


def padded_noise(
    parts: Sequence[tuple[Tensor | None, Tensor, int]],
) -> Float[Tensor, "row padded d_model"] | None:
    """The noise of a batch of several inputs: zero where one has none, and at its left padding.

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


def tile_boxes(
    grid_size: tuple[int, int], rows: int, columns: int
) -> list[tuple[int, int, int, int]]:
    """A grid in rows x columns boxes (row0, col0, row1, col1; half open), in reading order.

    Raises:
        ValueError: no boxes, or more than patches.
    """
    height, width = grid_size
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"{rows} x {columns} boxes of a grid of {height} x {width} patches")
    tops = [height * row // rows for row in range(rows + 1)]
    lefts = [width * column // columns for column in range(columns + 1)]
    return [
        (top, left, bottom, right)
        for top, bottom in pairwise(tops)
        for left, right in pairwise(lefts)
    ]
