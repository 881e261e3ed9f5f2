"""Text to tokens and back, under TransformerLens's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmlens.config import MultimodalConfig
from mmlens.inputs import MultimodalInputs
from mmlens.spans import token_strings

Tokens = Int[Tensor, "batch pos"]


class TokenMethods(nn.Module):
    """What a model with a tokenizer can do with text."""

    cfg: MultimodalConfig
    tokenizer: Any
    prepare: Callable[..., MultimodalInputs]
    W_U: Any

    def to_tokens(self, text: str | list[str], prepend_bos: bool | None = None) -> Tokens:
        """Token ids of text without pictures, left-padded."""
        return self.prepare(text, template=None, prepend_bos=prepend_bos).tokens

    def to_string(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer().decode(torch.as_tensor(tokens).tolist(), skip_special_tokens=True)

    def to_str_tokens(self, input: str | Tensor | Sequence[int]) -> list[str]:
        """Each token as text, with the space that it begins with."""
        tokens = self.to_tokens(input)[0] if isinstance(input, str) else input
        ids = torch.as_tensor(tokens).flatten().tolist()
        return token_strings(self._tokenizer(), ids)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            ValueError: it is none or several; the message shows them.
        """
        ids = self._tokenizer()(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {self.to_str_tokens(ids)}")
        return ids[0]

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.cfg.model_name or 'this model'} has no tokenizer: its checkpoint folder "
                "has no tokenizer.json; use token ids and inputs_from_tokens"
            )
        return self.tokenizer

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """The directions in the residual stream that the unembedding reads as `tokens`."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[torch.as_tensor(tokens, device=self.W_U.device)]
