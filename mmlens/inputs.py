"""What a multimodal model is given: tokens, pixels, mask and named spans in ONE index space.

    inputs = model.prepare("What is the capital of this country?", flag,
                           spans={"constraint": "this country"})
    inputs.span("constraint")        # positions of the phrase
    inputs.span("image")             # positions of the visual tokens
    inputs.patch(3, 5)               # position of one patch of the picture
    inputs.grid[0, position]         # and back: (image, row, column), -1 for text

`tokens` holds one entry per visual token (the id of `<image>`, repeated), so a position means the
same in `tokens`, in every activation and in every span. Rows of a batch are padded on the left;
positions count the padding.

Public names: `MultimodalInputs`, `collate`, `UnknownSpanError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from mmlens.layout import (
    PAD_LABEL,
    appended_strings,
    check_devices,
    check_grid,
    check_images,
    check_mask,
    check_noise,
    check_pictures,
    check_rows,
    check_same,
    check_spans,
    check_str_tokens,
    image_positions,
    image_starts,
    joined_rows,
    padded_noise,
    position_labels,
    shortened,
    tile_boxes,
)

__all__ = ["MultimodalInputs", "UnknownSpanError", "collate"]


class UnknownSpanError(KeyError):
    """A span name that the inputs do not have; the message lists those they have."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument: a whole sentence in quotes.
        return str(self.args[0])


@dataclass(frozen=True, eq=False, repr=False)
class MultimodalInputs:
    """A batch of prompts with their images. Made by `prepare`, `inputs_from_tokens`, `collate`.

    Construction checks everything that can be checked without a model; `dataclasses.replace`
    checks again.

    Raises:
        ValueError: image tokens without pixels, pixels without image tokens, numbers that differ,
            padding that is not on the left, spans outside of the tokens, fields of wrong length,
            tensors on several devices.
    """

    tokens: Int[Tensor, "batch pos"]
    """One id per position; the id of `<image>` at every visual token."""
    attention_mask: Bool[Tensor, "batch pos"]
    """False at the padding, which is on the left."""
    pixel_values: Float[Tensor, "image channel height width"] | None
    """All images of the batch in reading order: those of row 0, then those of row 1, ..."""
    spans: tuple[dict[str, Int[Tensor, " _"]], ...]
    """Named positions of each row: `image`, `image_0`, ... (where the row has images), `text` (all
    other tokens of the prompt but the BOS), `bos`, `question` where it is known, `last` (the
    prompt's last token), and the user's own."""
    grid_size: tuple[int, int] | None = None
    """Patches of one image: rows, columns."""
    n_visual_tokens: int = 0
    """Visual tokens of one image: rows x columns, and one more where the tower's class token is
    kept; that one comes first."""
    image_token_id: int | None = None
    str_tokens: tuple[list[str], ...] | None = None
    """The text of each position, for axes."""
    texts: tuple[str, ...] | None = None
    """The prompt of each row as text, with one `<image>` per image and without the BOS."""
    char_spans: tuple[dict[str, tuple[int, int]], ...] | None = None
    """Where the spans that were found in text lie in `texts`: start, end (half open)."""
    noise: Float[Tensor, "sample pos d_model"] | None = None
    """Added to the residual stream after the visual tokens are spliced in. A single row may have
    several samples: a run then has one row for each."""
    images: tuple[Image.Image, ...] | None = None
    """The pictures as they were given, for overlays; in the order of `pixel_values`."""

    def __post_init__(self) -> None:
        mask, pixels, noise = self.attention_mask, self.pixel_values, self.noise
        check_devices(self.tokens, attention_mask=mask, pixel_values=pixels, noise=noise)
        check_mask(self.tokens, mask)
        check_images(
            self.tokens,
            mask,
            None if pixels is None else pixels.shape[0],
            image_token_id=self.image_token_id,
            n_visual_tokens=self.n_visual_tokens,
        )
        check_spans(self.spans, mask)
        check_rows("texts", self.texts, len(self))
        check_rows("char_spans", self.char_spans, len(self))
        check_str_tokens(self.str_tokens, self.tokens)
        check_noise(noise, self.tokens)
        check_pictures(self.images, pixels)
        check_grid(self.grid_size, self.n_visual_tokens)

    def __len__(self) -> int:
        """Rows of the batch."""
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        names = dict.fromkeys(name for row in self.spans for name in row)
        pixels = None if self.pixel_values is None else tuple(self.pixel_values.shape)
        return (
            f"MultimodalInputs(batch={len(self)}, n_pos={self.n_pos}, pixel_values={pixels}, "
            f"spans={list(names)}, device={self.tokens.device})"
        )

    @property
    def n_pos(self) -> int:
        """Positions of a row, padding included."""
        return self.tokens.shape[1]

    @property
    def n_rows(self) -> int:
        """Rows of a run on these inputs: samples of noise are rows of their own."""
        return len(self) if self.noise is None else len(self.noise)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tokens.device

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Rotary positions: 0 at the first real token of each row, and at the padding."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def is_image(self) -> Bool[Tensor, "batch pos"]:
        """True at the visual tokens."""
        return image_positions(self.tokens, self.image_token_id)

    @cached_property
    def image_starts(self) -> tuple[tuple[int, ...], ...]:
        """First position of each image, per row: `image_starts[batch][image]`."""
        rows = self.is_image.cpu()
        return tuple(image_starts(row, self.n_visual_tokens) for row in rows)

    @property
    def n_images(self) -> tuple[int, ...]:
        """Images of each row; `pixel_values` has `sum(n_images)`."""
        return tuple(len(starts) for starts in self.image_starts)

    def span(self, name: str, *, batch: int | None = None) -> Int[Tensor, " n"]:
        """Positions of a named span, ascending.

        Args:
            name: one of `spans`.
            batch: the row. Not needed for one row, or where the span has the same positions in
                every row.

        Raises:
            UnknownSpanError: (a KeyError) no span of that name; lists the names there are.
            ValueError: rows differ and `batch` is not given, or no such row.
        """
        rows = range(len(self)) if batch is None else [self._row(batch)]
        found = [self._span_of_row(name, row) for row in rows]
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise ValueError(
                f"span {name!r} has other positions in other rows of this batch of {len(self)}: "
                f"{', '.join(shortened(positions) for positions in found[:4])}"
                f"{', ...' if len(found) > 4 else ''}; give batch=0 ... {len(self) - 1}"
            )
        return found[0]

    def _span_of_row(self, name: str, row: int) -> Tensor:
        if name not in self.spans[row]:
            why = " (this row has no image)" if name.startswith("image") else ""
            raise UnknownSpanError(
                f"no span is called {name!r} in row {row}{why}; "
                f"there are: {', '.join(self.spans[row]) or 'none'}"
            )
        return self.spans[row][name]

    def patch(self, row: int, col: int, *, image: int = 0, batch: int | None = None) -> int:
        """Position of the visual token of one patch.

        Args:
            row: the patch's row, counted from the top.
            col: its column, counted from the left.
            image: which image of the row of the batch.
            batch: as in `span`.

        Raises:
            ValueError: a patch outside of the grid, no such image, or rows that differ.
        """
        return int(self.patches((row, col, row + 1, col + 1), image=image, batch=batch)[0])

    def patches(
        self, box: tuple[int, int, int, int], *, image: int = 0, batch: int | None = None
    ) -> Int[Tensor, " n"]:
        """Positions of a rectangle of patches, in reading order.

        Args:
            box: `(row0, col0, row1, col1)` in patches, half open: `(0, 0, 2, 3)` is the six
                patches in the top left corner.
            image: as in `patch`.
            batch: as in `span`.

        Raises:
            ValueError: an empty box or one that leaves the grid, no such image, rows that differ.
        """
        if self.grid_size is None:
            raise ValueError("these inputs have no image, and so no patches")
        n_rows, n_cols = self.grid_size
        row0, col0, row1, col1 = box
        if not (0 <= row0 < row1 <= n_rows and 0 <= col0 < col1 <= n_cols):
            raise ValueError(
                f"patches {box} (row0, col0, row1, col1; half open) are not inside the grid of "
                f"{n_rows} rows x {n_cols} columns: rows go from 0 to {n_rows - 1}, columns from 0 "
                f"to {n_cols - 1}"
            )
        rows = torch.arange(row0, row1, device=self.device)
        cols = torch.arange(col0, col1, device=self.device)
        inside = (rows[:, None] * n_cols + cols).flatten() + self._first_patch
        if inside[0] < 0:
            raise ValueError("patch (0, 0) has no visual token: this model leaves it out")
        return self._image_start(image, batch) + inside

    def tiles(
        self, rows: int, columns: int, *, image: int = 0, batch: int | None = None
    ) -> list[Int[Tensor, " _"]]:
        """The picture in rows x columns boxes of patches, in reading order; sizes differ by one.

        Raises:
            ValueError: more boxes than patches, or as `patches`.
        """
        boxes = tile_boxes(self.grid_size or (0, 0), rows, columns)
        return [self.patches(box, image=image, batch=batch) for box in boxes]

    @property
    def _first_patch(self) -> int:
        """Where patch (0, 0) stands among an image's tokens: -1 where it has none."""
        rows, cols = self.grid_size or (0, 0)
        return self.n_visual_tokens - rows * cols

    def _image_start(self, image: int, batch: int | None) -> int:
        starts = []
        for row in range(len(self)) if batch is None else [self._row(batch)]:
            here = self.image_starts[row]
            if not 0 <= image < len(here):
                raise ValueError(f"row {row} has {len(here)} image(s); there is no image {image}")
            starts.append(here[image])
        if len(set(starts)) > 1:
            raise ValueError(
                f"image {image} begins at other positions in other rows ({starts}); "
                f"give batch=0 ... {len(self) - 1}"
            )
        return starts[0]

    def _row(self, batch: int) -> int:
        if not 0 <= batch < len(self):
            raise ValueError(f"batch={batch}, but these inputs have {len(self)} row(s), from 0")
        return batch

    @property
    def grid(self) -> Int[Tensor, "batch pos 3"]:
        """From positions back to the pictures: `(image, row, column)` of every visual token.

        -1 elsewhere. `image` counts within the row of the batch; a class token has row and column
        -1.
        """
        where = torch.full((*self.tokens.shape, 3), -1, dtype=torch.long)
        if self.grid_size is not None:
            cell = torch.cartesian_prod(
                torch.arange(self.grid_size[0]), torch.arange(self.grid_size[1])
            )
            # A class token in front of the patches, or the first patch left out.
            class_token = torch.full((max(self._first_patch, 0), 2), -1, dtype=torch.long)
            cell = torch.cat([class_token, cell])[-self.n_visual_tokens :]
            for row, starts in enumerate(self.image_starts):
                for image, start in enumerate(starts):
                    where[row, start : start + self.n_visual_tokens, 0] = image
                    where[row, start : start + self.n_visual_tokens, 1:] = cell
        return where.to(self.device)

    def append(
        self,
        tokens: Int[Tensor, " n"] | Int[Tensor, "batch n"],
        str_tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> MultimodalInputs:
        """The same prompts with tokens at the end, such as an answer.

        Spans stay as they are: `last` is still the prompt's last token, `text` the prompt's text.

        Args:
            tokens: the same for every row, or one row each.
            str_tokens: their texts, in the same form.

        Raises:
            ValueError: another number of rows, or image tokens among them.
        """
        rows = tokens.expand(len(self), -1) if tokens.ndim == 1 else tokens
        if rows.shape[0] != len(self):
            raise ValueError(f"{rows.shape[0]} rows of tokens for {len(self)} rows of inputs")
        rows = rows.to(self.tokens)
        n = rows.shape[1]
        return replace(
            self,
            tokens=torch.cat([self.tokens, rows], dim=1),
            attention_mask=pad(self.attention_mask, (0, n), value=True),
            str_tokens=appended_strings(self.str_tokens, rows.tolist(), str_tokens),
            noise=None if self.noise is None else pad(self.noise, (0, 0, 0, n)),
        )

    def to(self, device: torch.device | str | int) -> MultimodalInputs:
        """The same inputs on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            attention_mask=self.attention_mask.to(device),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device),
            spans=tuple({name: at.to(device) for name, at in row.items()} for row in self.spans),
            noise=None if self.noise is None else self.noise.to(device),
        )

    def labels(self, batch: int = 0) -> list[str]:
        """A short label for every position: the token's text, `<img 3,5>` for a visual token.

        The second image of a row has `<img1 3,5>`, a class token `<img cls>`, padding `<pad>`.
        """
        row = self._row(batch)
        texts = (
            [str(token) for token in self.tokens[row].tolist()]
            if self.str_tokens is None
            else self.str_tokens[row]
        )
        return position_labels(
            texts,
            self.attention_mask[row].tolist(),
            self.grid[row].tolist(),
            several=len(self.image_starts[row]) > 1,
        )


def collate(inputs: Sequence[MultimodalInputs], pad_token_id: int) -> MultimodalInputs:
    """One batch from several inputs, padded on the left; spans move with their tokens.

    What only some of them have (`texts`, `str_tokens`, `char_spans`, `images`) is dropped, missing
    `noise` is zero.

    Raises:
        ValueError: nothing to collate, models with other image tokens or grids, images of other
            sizes, the image token as padding, several samples of noise.
    """
    if not inputs:
        raise ValueError("nothing to collate: the list of inputs is empty")
    with_images = [one for one in inputs if one.pixel_values is not None] or list(inputs[:1])
    for name in ("image_token_id", "grid_size", "n_visual_tokens"):
        check_same(name, [getattr(one, name) for one in with_images])
    first = with_images[0]
    if pad_token_id == first.image_token_id:
        raise ValueError(f"pad_token_id={pad_token_id} is the image token: padding would be images")
    pixels = [one.pixel_values for one in with_images if one.pixel_values is not None]
    check_same("image shape", [tuple(one.shape[1:]) for one in pixels])
    n_pos = max(one.n_pos for one in inputs)
    missing = [n_pos - one.n_pos for one in inputs]
    left = list(zip(inputs, missing, strict=True))
    return MultimodalInputs(
        tokens=torch.cat([pad(one.tokens, (n, 0), value=pad_token_id) for one, n in left]),
        attention_mask=torch.cat([pad(one.attention_mask, (n, 0)) for one, n in left]),
        pixel_values=torch.cat(pixels) if pixels else None,
        spans=tuple(
            {name: at + n for name, at in row.items()} for one, n in left for row in one.spans
        ),
        grid_size=first.grid_size,
        n_visual_tokens=first.n_visual_tokens,
        image_token_id=first.image_token_id,
        str_tokens=joined_rows(
            None if one.str_tokens is None else [[PAD_LABEL] * n + row for row in one.str_tokens]
            for one, n in left
        ),
        texts=joined_rows(one.texts for one in inputs),
        char_spans=joined_rows(one.char_spans for one in inputs),
        noise=padded_noise([(one.noise, one.tokens, n) for one, n in left]),
        images=joined_rows(one.images for one in with_images) if pixels else None,
    )
