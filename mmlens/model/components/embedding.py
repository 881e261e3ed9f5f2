"""Tokens to the residual stream, and the residual stream to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Embed(nn.Module):
    """The token embedding: rows of `W_E`, times `scale`."""

    def __init__(self, d_vocab: int, d_model: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.W_E = nn.Parameter(torch.empty(d_vocab, d_model).normal_(std=0.02))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the rows of `W_E`, times the scale as their dtype has it (as in transformers)."""
        rows = F.embedding(tokens, self.W_E)
        if self.scale == 1.0:
            return rows
        return rows * torch.tensor(self.scale, dtype=rows.dtype).item()


class Unembed(nn.Module):
    """The output projection; `weight` may be the embedding's own parameter.

    Products with it are multiplied by `scale`. With a `softcap` c, such a product x becomes the
    logit c tanh(x / c).
    """

    def __init__(
        self,
        d_vocab: int,
        d_model: int,
        bias: bool = False,
        softcap: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.softcap, self.scale = softcap, scale
        self.weight = nn.Parameter(torch.empty(d_vocab, d_model).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_vocab)) if bias else None

    def forward(
        self, resid: Float[Tensor, "*batch d_model"], tokens: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "*batch n_tokens"]:
        """Return logits, of the whole vocabulary or of some tokens alone."""
        return self._capped(self.products(resid, tokens))

    def products(
        self, resid: Float[Tensor, "*batch d_model"], tokens: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "*batch n_tokens"]:
        """Return logits before they are capped; arguments as of `forward`."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if tokens is not None:
            tokens = tokens.to(weight.device)
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        return self._scaled(F.linear(resid, weight, bias))

    def apply_output_logits_transform(
        self, products: Float[Tensor, "*batch n_tokens"]
    ) -> Float[Tensor, "*batch n_tokens"]:
        """Return the logits that `x @ W_U + b_U` become; TransformerLens's lenses ask for it."""
        return self._capped(self._scaled(products))

    def _scaled(self, products: Tensor) -> Tensor:
        return products if self.scale == 1.0 else products * self.scale

    def _capped(self, products: Tensor) -> Tensor:
        return products if self.softcap is None else capped(products, self.softcap)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """A writable view in TransformerLens's shape."""
        return self.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Output bias; zeros where the model has none."""
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias


def capped(x: Float[Tensor, "*shape"], cap: float) -> Float[Tensor, "*shape"]:
    """Return c tanh(x / c), which is nearly x where x is small beside the cap c."""
    return (x / cap).tanh() * cap
