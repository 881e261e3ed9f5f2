"""The inputs of a multimodal model: tokens, pixels, mask and named spans in ONE index space.

    inputs = model.prepare("What is the capital of this country?", flag,
                           spans={"constraint": "this country"})
    inputs.span("constraint")        # positions of the phrase
    inputs.span("image")             # positions of the visual tokens
    inputs.patch(3, 5)               # position of one patch of the image
    inputs.patches((40, 0, 90, 60))  # the tokens of a box in the image's pixels
    inputs.grid[0, position]         # and back: (image, view, row, column), -1 for text

`tokens` holds one entry per visual token (the id of `<image>`, repeated), so a position means the
same in `tokens`, in every activation and in every span. Rows of a batch are padded on the left;
positions count the padding.

Public names: `MultimodalInputs`, `UnknownSpanError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mmlens.inputs.checks import (
    appended_strings,
    check_blocks,
    check_devices,
    check_image_tokens,
    check_mask,
    check_noise,
    check_rows,
    check_spans,
    check_str_tokens,
    image_positions,
    shortened,
)
from mmlens.inputs.image_places import ImagePlaces
from mmlens.inputs.image_tokens import ImageTokens
from mmlens.inputs.position_labels import position_labels
from mmlens.inputs.rope_positions import rope_positions
from mmlens.inputs.token_array import TokenArray
from mmlens.inputs.visual import Visual

__all__ = ["MultimodalInputs", "UnknownSpanError"]


class UnknownSpanError(KeyError):
    """A span name that the inputs do not have; the message lists those they have."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument: a whole sentence in quotes.
        return str(self.args[0])


@dataclass(frozen=True, eq=False, repr=False)
class MultimodalInputs(ImagePlaces, TokenArray):
    """A batch of prompts with their images. Made by `prepare`, `inputs_from_tokens`, `collate`.

    Construction checks everything that can be checked without a model; `dataclasses.replace`
    checks again.

    Raises:
        ValueError: image tokens that belong to no image, images without their tokens, padding that
            is not on the left, spans outside of the tokens, fields of wrong length,
            tensors on several devices.
    """

    tokens: Int[Tensor, "batch pos"]
    """One id per position; the id of `<image>` at every visual token."""
    attention_mask: Bool[Tensor, "batch pos"]
    """False at the padding, which is on the left."""
    visual: Visual | None
    """What the vision tower takes: all images of the batch in reading order, those of row 0, then
    those of row 1, ..."""
    spans: tuple[dict[str, Int[Tensor, " _"]], ...]
    """Named positions of each row: `image`, `image_0`, ... (where the row has images), `text` (all
    other tokens of the prompt but the BOS), `bos`, `question` where it is known, `last` (the
    prompt's last token), and the user's own."""
    images: tuple[ImageTokens, ...] = ()
    """Where the visual tokens of each image stand, in the order of `visual`."""
    image_token_id: int | None = None
    str_tokens: tuple[list[str], ...] | None = None
    """The text of each position, for axes."""
    texts: tuple[str, ...] | None = None
    """The prompt of each row as text, with one `<image>` per image and without the BOS."""
    char_spans: tuple[dict[str, tuple[int, int]], ...] | None = None
    """Where the spans that were found in text lie in `texts`: start, end (half open)."""
    blocks: Int[Tensor, "batch pos"] | None = None
    """Where a model's attention is not causal alone: positions of a row with one number (0 or more)
    attend to each other, whichever comes first; -1 stands for those that attend to what is before
    them. Those of an image (Gemma 3) or of the prompt (PaliGemma) are a block. None: no blocks."""
    noise: Float[Tensor, "sample pos d_model"] | None = None
    """Added to the residual stream after the visual tokens are spliced in; what is beyond its width
    to what images add in block 0, 1, ... (deepstack). A single row may have several samples: a run
    then has one row for each."""

    def __post_init__(self) -> None:
        mask, noise = self.attention_mask, self.noise
        check_devices(
            self.tokens,
            attention_mask=mask,
            noise=noise,
            blocks=self.blocks,
            **dict(self.visual or {}),
        )
        check_mask(self.tokens, mask)
        check_blocks(self.tokens, self.blocks)
        check_image_tokens(self.tokens, mask, self.images, self.image_token_id)
        n_images = 0 if self.visual is None else self.visual.n_images
        if n_images != len(self.images):
            raise ValueError(f"pixels of {n_images} image(s), but tokens of {len(self.images)}")
        check_spans(self.spans, mask)
        check_rows("texts", self.texts, len(self))
        check_rows("char_spans", self.char_spans, len(self))
        check_str_tokens(self.str_tokens, self.tokens)
        check_noise(noise, self.tokens)

    def __len__(self) -> int:
        """Return the number of rows of the batch."""
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        names = dict.fromkeys(name for row in self.spans for name in row)
        visual = {name: tuple(tensor.shape) for name, tensor in (self.visual or {}).items()}
        shapes = "".join(f"{name}={shape}, " for name, shape in visual.items())
        return (
            f"MultimodalInputs(batch={len(self)}, n_pos={self.n_pos}, {shapes}"
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

    @cached_property
    def rope_positions(self) -> Int[Tensor, "axis batch pos"]:
        """Rotary positions: 0 at the first real token of each row, and at the padding.

        On one axis, or on three (time, row, column) where an image's tokens are told apart by
        them; see `mmlens.inputs.rope_positions`.
        """
        return rope_positions(self.attention_mask, self.images)

    @property
    def is_image(self) -> Bool[Tensor, "batch pos"]:
        """True at the visual tokens."""
        return image_positions(self.tokens, self.image_token_id)

    @property
    def pixel_values(self) -> Tensor | None:
        """The pixels of all images, as `visual["pixel_values"]`; None where there are none."""
        return None if self.visual is None else self.visual["pixel_values"]

    def with_pixels(self, pixel_values: Tensor) -> MultimodalInputs:
        """Return the same prompts with other pixels, of the same shape.

        The images as they were given are dropped, since they show something else.

        Raises:
            ValueError: these inputs have no image, or pixels of another shape.
        """
        if self.visual is None:
            raise ValueError("these inputs have no image")
        before, after = tuple(self.visual["pixel_values"].shape), tuple(pixel_values.shape)
        if before != after:
            raise ValueError(f"pixel values of shape {after}; those of these inputs are {before}")
        changed = replace(self, visual=self.visual.replaced(pixel_values=pixel_values))
        return changed.without_images()

    def without_images(self) -> MultimodalInputs:
        """Return the same inputs, which do not hold the images as they were given any more."""
        return replace(self, images=tuple(replace(image, image=None) for image in self.images))

    def span(self, name: str, *, batch: int | None = None) -> Int[Tensor, " n"]:
        """Return the positions of a named span, ascending.

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
            n = len(self.by_row[row])
            images = "1 image" if n == 1 else f"{n or 'no'} images"
            why = f" (this row has {images})" if name.startswith("image") else ""
            raise UnknownSpanError(
                f"no span is called {name!r} in row {row}{why}; "
                f"there are: {', '.join(self.spans[row]) or 'none'}"
            )
        return self.spans[row][name]

    def _row(self, batch: int) -> int:
        if not 0 <= batch < len(self):
            raise ValueError(f"batch={batch}, but these inputs have {len(self)} row(s), from 0")
        return batch

    def append(
        self,
        tokens: Int[Tensor, " n"] | Int[Tensor, "batch n"],
        str_tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> MultimodalInputs:
        """Return the same prompts with tokens at the end, such as an answer.

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
            blocks=None if self.blocks is None else pad(self.blocks, (0, n), value=-1),
            noise=None if self.noise is None else pad(self.noise, (0, 0, 0, n)),
        )

    def to(self, device: torch.device | str | int) -> MultimodalInputs:
        """Return the same inputs on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            attention_mask=self.attention_mask.to(device),
            visual=None if self.visual is None else self.visual.to(device),
            spans=tuple({name: at.to(device) for name, at in row.items()} for row in self.spans),
            blocks=None if self.blocks is None else self.blocks.to(device),
            noise=None if self.noise is None else self.noise.to(device),
        )

    def labels(self, batch: int = 0) -> list[str]:
        """Return a label for every position: the token's text, `<img 3,5>` for a visual token.

        The second image of a row has `<img1 3,5>`, an image with several views `<img 0:3,5>`, the
        end of a line `<img newline>`, padding `<pad>`; all: `mmlens.inputs.position_labels`.
        """
        row = self._row(batch)
        texts = (
            [str(token) for token in self.tokens[row].tolist()]
            if self.str_tokens is None
            else self.str_tokens[row]
        )
        return position_labels(texts, self.attention_mask[row].tolist(), self.by_row[row])
