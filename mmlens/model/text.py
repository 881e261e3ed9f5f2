"""Text to tokens and back, under TransformerLens's names."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmlens.config import MultimodalConfig
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.spans import PLACEHOLDER, token_strings
from mmlens.inputs.special_tokens import Side, padding_token, prompt_ids

Tokens = Int[Tensor, "batch pos"]


class TokenMethods(nn.Module):
    """What a model with a tokenizer can do with text and token ids.

    BOS and other special tokens are those that transformers' tokenizer adds itself, unless
    `prepend_bos` or `cfg.default_prepend_bos` says otherwise. The tokenizer of a loaded model pads
    on the left, unless its files name a side; `tokenizer.padding_side` and `padding_side=` change
    it for token ids. `MultimodalInputs` are padded on the left always. See
    `mmlens.inputs.special_tokens`.
    """

    cfg: MultimodalConfig
    tokenizer: Any
    device: Any
    embed: Any
    W_U: Any

    def to_tokens(
        self,
        input: str | Sequence[str] | MultimodalInputs,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Any:
        """Return the token ids of text without images, one row for each text.

        `MultimodalInputs` are returned as they are, for tools that call this on every prompt.

        Args:
            input: a text or a list of texts; shorter ones are padded.
            prepend_bos: whether to begin with BOS. None does what the model was trained with
                (`cfg.default_prepend_bos`), or else what transformers' tokenizer does. Give False
                for a part of a prompt, such as an answer.
            padding_side: "left" or "right"; by default `tokenizer.padding_side`.
            move_to_device: put the ids where the model is; else they stay on the CPU.
            truncate: cut texts to `cfg.n_ctx` tokens.

        Raises:
            ValueError: no tokenizer, no texts, a text without tokens beside others, texts of
                different lengths for a tokenizer without a padding token, or `<image>` in a text
                where that is no token of the checkpoint's.

        Example:
            >>> model.to_tokens(["The capital of France", " Paris"], prepend_bos=False)
        """
        if isinstance(input, MultimodalInputs):
            return input
        tokenizer = self._tokenizer()
        texts = [input] if isinstance(input, str) else list(input)
        if not texts:
            raise ValueError("the list of texts is empty")
        if self.cfg.image_placeholder != PLACEHOLDER and any(PLACEHOLDER in text for text in texts):
            raise ValueError(
                f"a text has {PLACEHOLDER} in it, which is where `model.prepare` puts an image; "
                f"this model's own word for one is {self.cfg.image_placeholder}, and to_tokens "
                "takes text without images"
            )
        bos, n_most = self._prepends_bos(prepend_bos), self.cfg.n_ctx if truncate else None
        rows = [prompt_ids(tokenizer, text, bos, n_most) for text in texts]
        longest, side = max(map(len, rows)), self._padding_side(padding_side)
        if not all(rows) and longest:
            raise ValueError(f"text {rows.index([])} of {len(rows)} has no tokens: {texts!r}")
        pad = padding_token(*self._vocabulary())
        if pad is None:
            if min(map(len, rows)) < longest:
                raise ValueError(
                    "the texts have different numbers of tokens, and the tokenizer has no padding "
                    "token: set model.tokenizer.pad_token, or use `model.prepare`"
                )
            pad = 0
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        tokens = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
        return tokens.to(self.device) if move_to_device else tokens

    @overload
    def to_string(self, tokens: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    @overload
    def to_string(self, tokens: Any, *, skip_special_tokens: bool = ...) -> Any: ...

    def to_string(
        self,
        tokens: Tensor | np.ndarray | Sequence[Any] | MultimodalInputs,
        *,
        skip_special_tokens: bool = False,
    ) -> Any:
        """Return the text of token ids: one for [pos], a list of them for [batch, pos].

        Args:
            tokens: ids.
            skip_special_tokens: leave out BOS, padding and the like.

        Raises:
            TypeError: inputs, and what has their text.
            ValueError: more than two axes.
        """
        if isinstance(tokens, MultimodalInputs):
            raise TypeError(
                "inputs with images are no text: inputs.texts are their prompts, "
                "model.to_str_tokens(inputs) says each position, and inputs.tokens are the ids"
            )
        ids = torch.as_tensor(np.asarray(tokens) if isinstance(tokens, Sequence) else tokens)
        if ids.ndim > 2:
            raise ValueError(f"tokens must be [pos] or [batch, pos], not {tuple(ids.shape)}")
        texts = [
            self._tokenizer().decode(
                row, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            for row in (ids if ids.ndim == 2 else ids.reshape(1, -1)).tolist()
        ]
        return texts if ids.ndim == 2 else texts[0]

    @overload
    def to_str_tokens(
        self, input: str | Sequence[int], prepend_bos: bool | None = ..., padding_side: Any = ...
    ) -> list[str]: ...

    @overload
    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = ..., padding_side: Any = ...
    ) -> Any: ...

    def to_str_tokens(
        self,
        input: str | Tensor | np.ndarray | Sequence[Any] | MultimodalInputs,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
    ) -> Any:
        """Return each token as text, with the space that it begins with.

        Args:
            input: a text, or the ids of one row ([pos] or [1, pos]); a list of texts or of rows
                gives a list of such lists, each as long as it is by itself.
            prepend_bos: of text, as in `to_tokens`.
            padding_side: taken for the sake of TransformerLens; nothing is padded.

        Raises:
            ValueError: a tensor of several rows; give a list of them.
        """
        if isinstance(input, MultimodalInputs):
            return input.labels()
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, truncate=False, move_to_device=False)
        if isinstance(input, list | tuple) and not all(isinstance(one, Integral) for one in input):
            return [self.to_str_tokens(one, prepend_bos, padding_side) for one in input]
        ids = torch.as_tensor(input)
        if ids.ndim > 1 and ids.shape[:-1].numel() != 1:
            raise ValueError(
                f"tokens of shape {tuple(ids.shape)} are several rows: give a list of them "
                f"(`model.to_str_tokens(list(tokens))`)"
            )
        return token_strings(self._tokenizer(), ids.flatten().tolist())

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is exactly one token.

        Raises:
            ValueError: it is none or several; the message shows them.
        """
        ids = self._tokenizer()(string, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{string!r} is {len(ids)} tokens, not one: {self.to_str_tokens(ids)}")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of one token id."""
        (text,) = token_strings(self._tokenizer(), [int(int_token)])
        return text

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Tensor | MultimodalInputs,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
    ) -> int:
        """Return where a token stands in a text or in the ids of one row.

        Args:
            single_token: an id, or a text that is one token.
            input: a text, ids [pos] or [1, pos], or inputs of one row.
            mode: which of several to take, "first" or "last".
            prepend_bos: of text, as in `to_tokens`.
            padding_side: of text, as in `to_tokens`.

        Raises:
            ValueError: it is not there, there are several rows, or an unknown mode.

        Example:
            >>> model.get_token_position(" capital", "The capital of Italy")
        """
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', not {mode!r}")
        tokens = input.tokens if isinstance(input, MultimodalInputs) else input
        if isinstance(input, str):
            tokens = self.to_tokens(input, prepend_bos, padding_side, truncate=False)
        ids = torch.as_tensor(tokens)
        if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
            raise ValueError(f"get_token_position takes one row, not tokens {tuple(ids.shape)}")
        if isinstance(single_token, str):
            token = self.to_single_token(single_token)
        else:
            token = int(single_token)
        found = (ids.flatten() == token).nonzero().flatten().tolist()
        if not found:
            raise ValueError(
                f"the token {single_token!r} (id {token}) does not occur in the prompt "
                f"{input if isinstance(input, str) else ids.flatten().tolist()!r}"
            )
        return found[0 if mode == "first" else -1]

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the directions in the residual stream that the unembedding reads as `tokens`.

        Columns of `W_U`, times `cfg.logits_scale`, on the model's first device. They read what the
        final norm hands on, so apply it first:
        `cache.apply_ln_to_stack(stack) @ model.tokens_to_residual_directions(t)`.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        columns = self.W_U.T[torch.as_tensor(tokens, device=self.W_U.device)]
        if self.cfg.logits_scale != 1.0:
            columns = columns * self.cfg.logits_scale
        return columns.to(self.embed.W_E.device)

    # What the tokenizer and the config say

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.cfg.model_name or 'this model'} has no tokenizer: its checkpoint folder "
                "has no tokenizer.json; use token ids and inputs_from_tokens"
            )
        return self.tokenizer

    def _vocabulary(self) -> tuple[Any, MultimodalConfig]:
        return self.tokenizer, self.cfg

    def _prepends_bos(self, prepend_bos: bool | None) -> bool | None:
        return self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos

    def _padding_side(self, side: Side | None) -> Side:
        side = side or getattr(self.tokenizer, "padding_side", None) or "left"
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {side!r}")
        return side
