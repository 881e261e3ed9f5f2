"""The loss of a language model that sees images: text alone is predicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.model.components.norm import float32_or_wider


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "rows pos"],
    real: Bool[Tensor, "rows pos"],
    is_image: Bool[Tensor, "rows pos"],
    per_token: bool,
    not_counted: float = torch.nan,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_but_first"]:
    """Return the negative log likelihood of every next token that is text, in nats.

    In float32 or wider; padding is False in `real`. Instead of the mean, `per_token` gives the loss
    of each next token, and `not_counted` where that is padding or visual. Several samples of noise
    share the tokens of one row.
    """
    tokens, real, is_image = (each.expand(len(logits), -1) for each in (tokens, real, is_image))
    counted = (real & ~is_image)[:, 1:] & real[:, :-1]
    targets = tokens[:, 1:].masked_fill(~counted, 0)
    wide = float32_or_wider(logits)[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(wide, targets, reduction="none")
    if per_token:
        return losses.masked_fill(~counted, not_counted)
    return losses[counted].mean()
