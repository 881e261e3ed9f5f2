"""Tokens to the residual stream, and the residual stream to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Embed(nn.Module):
    """The token embedding."""

    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(d_vocab, d_model).normal_(std=0.02))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The rows of `W_E`."""
        return F.embedding(tokens, self.W_E)


class Unembed(nn.Module):
    """The output projection; `weight` may be the embedding's own parameter."""

    def __init__(self, d_vocab: int, d_model: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_vocab, d_model).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_vocab)) if bias else None

    def forward(
        self, resid: Float[Tensor, "*batch d_model"], tokens: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "*batch n_tokens"]:
        """Logits, of the whole vocabulary or of some tokens alone."""
        if tokens is None:
            return F.linear(resid, self.weight, self.bias)
        tokens = tokens.to(self.weight.device)
        return F.linear(
            resid, self.weight[tokens], None if self.bias is None else self.bias[tokens]
        )

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """A writable view in TransformerLens's shape."""
        return self.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Output bias; zeros where the model has none."""
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
