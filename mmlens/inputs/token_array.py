"""Rows of inputs, and inputs in the place of token ids: what TransformerLens's tools ask of those.

`transformer_lens.patching.*` and `utilities.test_prompt` are written for a tensor of token ids:
they ask for its `shape`, index it, repeat it and append an answer's tokens. `MultimodalInputs` can
do the same, images included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

Row = TypeVar("Row")
Inputs = TypeVar("Inputs", bound="TokenArray")


class TokenArray:
    """The operations of token ids `[batch, pos]`, for inputs that hold them."""

    if TYPE_CHECKING:  # fields of `MultimodalInputs`
        tokens: Tensor

        @property
        def n_images(self) -> tuple[int, ...]:
            """Images of each row."""

        def __len__(self) -> int: ...

    @property
    def shape(self) -> torch.Size:
        """Rows and positions, as of `tokens`."""
        return self.tokens.shape

    @property
    def ndim(self) -> int:
        """Axes, as of `tokens`: 2.

        Raises:
            AttributeError: there are images. TransformerLens's `attribution_patch` asks for this,
                and would find that no image has an effect, since none is in `hook_embed` yet.
        """
        if any(self.n_images):
            raise AttributeError(
                "inputs with images have no ndim: TransformerLens's attribution_patch reads "
                "hook_embed, where no image is yet; mmlens.attribution_patching takes images, and "
                "inputs.tokens.ndim is that of the ids"
            )
        return self.tokens.ndim

    def __getitem__(self, index: Any) -> Any:
        """Return token ids: `inputs[0]` of row 0, `inputs[:, -1]` the last of each row.

        A slice of rows, `inputs[0:1]`, is inputs with the images of these rows, as `rows` returns.
        """
        if isinstance(index, slice):
            return self.rows(range(*index.indices(len(self))))
        return self.tokens[index]

    def cpu(self: Inputs) -> Inputs:
        """Return these inputs on the CPU."""
        whole: Any = self
        return whole.to("cpu")

    def images_of(self, rows: Sequence[int]) -> list[int]:
        """Return which images (indices into `images`) belong to these rows, in order."""
        ends = torch.tensor(self.n_images).cumsum(0).tolist()
        return [image for row in rows for image in range(ends[row] - self.n_images[row], ends[row])]

    def visual_tokens_of(self, images: Sequence[int]) -> list[int]:
        """Return which visual tokens, counted over the whole batch, belong to these images."""
        whole: Any = self
        ends = list(accumulate((len(image.positions) for image in whole.images), initial=0))
        return [token for image in images for token in range(ends[image], ends[image + 1])]

    def rows(self: Inputs, rows: Sequence[int]) -> Inputs:
        """Return these rows as new inputs, with their images; a row may occur several times.

        Padding stays, so positions are the same.

        Raises:
            IndexError: no such row.
            ValueError: rows of a prompt with several samples of noise, which are rows themselves.

        Example:
            >>> logits = model(inputs.rows([2]))
        """
        whole: Any = self
        noise, index = whole.noise, list(rows)
        if noise is not None and len(noise) != len(self):
            raise ValueError(
                f"these inputs have {len(noise)} samples of noise for one row: change the noise "
                "with dataclasses.replace"
            )
        missing = [row for row in rows if not 0 <= row < len(self)]
        if missing:
            raise IndexError(f"row {missing[0]}, but these inputs have {len(self)} row(s), from 0")
        chosen = self.images_of(rows)
        placed = [row for row, old in enumerate(rows) for _ in range(self.n_images[old])]
        return replace(
            whole,
            tokens=whole.tokens[index],
            attention_mask=whole.attention_mask[index],
            visual=whole.visual.of(chosen) if chosen else None,
            images=tuple(
                replace(whole.images[image], row=row)
                for image, row in zip(chosen, placed, strict=True)
            ),
            spans=entries_at(whole.spans, rows),
            str_tokens=entries_at(whole.str_tokens, rows),
            texts=entries_at(whole.texts, rows),
            char_spans=entries_at(whole.char_spans, rows),
            blocks=None if whole.blocks is None else whole.blocks[index],
            noise=None if noise is None else noise[index],
        )

    def repeat(self: Inputs, times: int, along_positions: int = 1) -> Inputs:
        """Repeat all rows, one time after the other, as `torch.Tensor.repeat(times, 1)`.

        Raises:
            ValueError: positions were to be repeated.
        """
        if along_positions != 1:
            raise ValueError("rows can be repeated, positions cannot: repeat(times, 1)")
        return self.rows(list(range(len(self))) * times)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Append tokens for `torch.cat((inputs, tokens), dim=1)`; no other function is known.

        Raises:
            TypeError: another function, or another order.
        """
        parts, *rest = args
        dim = rest[0] if rest else (kwargs or {}).get("dim", 0)
        if function is not torch.cat or dim not in (1, -1) or isinstance(parts[0], Tensor):
            raise TypeError(
                f"torch.{function.__name__} of {cls.__name__}: torch.cat((inputs, tokens), dim=1) "
                "appends tokens; for all else take inputs.tokens"
            )
        whole, *others = parts
        for tokens in others:
            whole = whole.append(tokens)
        return whole


def entries_at(each: tuple[Row, ...] | None, indices: Sequence[int]) -> Any:
    """Return the entries at `indices`; None where there are none at all."""
    return None if each is None else tuple(each[index] for index in indices)
