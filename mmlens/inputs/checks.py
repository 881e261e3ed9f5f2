"""Where images and padding lie in rows of tokens, and what is wrong where they cannot.

Every check raises a ValueError that says what was found and what would work. Nothing here knows
`MultimodalInputs`: these are functions of tokens and masks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Sized
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmlens.inputs.image_tokens import ImageTokens

RESERVED_SPANS = ("image", "text", "bos", "last")
"""Names that are always filled from the tokens, and so are not the user's to give (nor `image_0`,
`image_1`, ...)."""

T = TypeVar("T")


def image_positions(
    tokens: Int[Tensor, "*batch pos"], image_token_id: int | None
) -> Bool[Tensor, "*batch pos"]:
    """Return where visual tokens stand."""
    if image_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return tokens == image_token_id


def image_starts(visual: Bool[Tensor, " pos"], n_visual_tokens: int) -> tuple[int, ...]:
    """Return the first position of each image of one row.

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
    images: Sequence[ImageTokens],
    *,
    bos_token_id: int | None,
) -> tuple[dict[str, Int[Tensor, " _"]], ...]:
    """Return the spans that follow from tokens: `image`, `image_0` ..., `text`, `bos`, `last`."""
    spans = []
    for number, (row, real) in enumerate(zip(tokens, attention_mask, strict=True)):
        named: dict[str, Tensor] = {}
        visual = torch.zeros_like(real)
        each = [image.positions.to(row.device) for image in images if image.row == number]
        if each:
            named["image"] = torch.cat(each)
            named |= {f"image_{i}": positions for i, positions in enumerate(each)}
            visual[named["image"]] = True
        text = (real & ~visual).nonzero().flatten()
        # PaliGemma's stands after the images.
        if bos_token_id is not None and len(text) and row[text[0]] == bos_token_id:
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


def check_ids(tokens: Tensor) -> None:
    """Raise an error unless these are token ids of one row or several.

    Raises:
        TypeError: numbers with a fraction, which would be cut off, or a mask.
        ValueError: another number of axes, or no tokens at all.
    """
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise TypeError(
            f"token ids are whole numbers, not {tokens.dtype}: a residual stream goes to "
            "model(resid, start_at_layer=0), a mask to attention_mask="
        )
    if tokens.ndim not in (1, 2):
        raise ValueError(f"tokens must be [batch, pos] or [pos], not {tuple(tokens.shape)}")
    if not tokens.numel():
        raise ValueError(f"there are no tokens: their shape is {tuple(tokens.shape)}")


def check_blocks(tokens: Tensor, blocks: Tensor | None) -> None:
    """Raise a ValueError unless there is a number of a block, or -1, for every token."""
    if blocks is not None and (blocks.shape != tokens.shape or blocks.is_floating_point()):
        raise ValueError(
            f"blocks are {blocks.dtype} of shape {tuple(blocks.shape)}; they must be whole numbers "
            f"of shape {tuple(tokens.shape)}, one for each token"
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


def check_vocabulary(
    tokens: Int[Tensor, " n"], d_vocab: int | None, image_token_id: int | None
) -> None:
    """Raise a ValueError for ids that the embedding has no row for, the image token's aside."""
    words = tokens if image_token_id is None else tokens[tokens != image_token_id]
    if d_vocab is None or not words.numel():
        return
    low, high = int(words.min()), int(words.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"tokens go from {low} to {high}, but this model's ids are 0 ... {d_vocab - 1}, and "
            f"{image_token_id} for a visual token"
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


def check_image_tokens(
    tokens: Tensor,
    attention_mask: Tensor,
    images: Sequence[ImageTokens],
    image_token_id: int | None,
) -> None:
    """Raise a ValueError unless the image tokens are the visual tokens of `images`."""
    visual = image_positions(tokens, image_token_id)
    if (visual & ~attention_mask).any():
        raise ValueError(f"the padding holds image tokens ({image_token_id}): pad with another id")
    claimed = torch.zeros_like(visual)
    for image in images:
        at = image.positions.to(tokens.device)
        if not 0 <= image.row < len(tokens) or (len(at) and int(at[-1]) >= tokens.shape[1]):
            raise ValueError(
                f"an image has positions {shortened(at)} in row {image.row}, but the tokens are "
                f"{tuple(tokens.shape)}"
            )
        claimed[image.row, at] = True
    if not torch.equal(visual, claimed):
        row, position = (visual != claimed).nonzero()[0].tolist()
        raise ValueError(
            f"position {position} of row {row} is "
            + ("an image token of no image" if visual[row, position] else "no image token")
            + f" (id {image_token_id}); the tokens hold {int(visual.sum())} image tokens, and the "
            f"{len(images)} image(s) have {int(claimed.sum())} visual tokens"
        )


def check_rows(name: str, rows: Sized | None, batch: int) -> None:
    """Raise a ValueError if there is not one entry per row of the batch."""
    if rows is not None and len(rows) != batch:
        raise ValueError(f"{name} has {len(rows)} entries for a batch of {batch} row(s)")


def shortened(positions: Tensor) -> str:
    """Return positions for a message: `[3, 4, 5, ..., 99]`."""
    values = positions.tolist()
    if len(values) <= 8:
        return str(values)
    return f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


def appended_strings(
    old: Sequence[list[str]] | None,
    tokens: Sequence[Sequence[int]],
    texts: Sequence[str] | Sequence[Sequence[str]] | None,
) -> tuple[list[str], ...] | None:
    """Return `str_tokens` of rows after tokens were appended; `[id]` where a text is not known."""
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


def tile_boxes(
    grid_size: tuple[int, int], rows: int, columns: int
) -> list[tuple[int, int, int, int]]:
    """Cut a grid into rows x columns boxes (row0, col0, row1, col1; half open), in reading order.

    Raises:
        ValueError: no boxes, or more than patches.
    """
    height, width = grid_size
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(
            f"{rows} x {columns} boxes of a grid of {height} x {width} patches: ask for 1 to "
            f"{height} rows of boxes and 1 to {width} columns"
        )
    tops = [height * row // rows for row in range(rows + 1)]
    lefts = [width * column // columns for column in range(columns + 1)]
    return [
        (top, left, bottom, right)
        for top, bottom in pairwise(tops)
        for left, right in pairwise(lefts)
    ]
