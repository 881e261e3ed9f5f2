"""The loss of a language model that sees images: text alone is predicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.model.components.norm import float32_or_wider


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    is_image: Bool[Tensor, "batch pos"],
    per_token: bool,
    not_counted: float = torch.nan,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_but_first"]:
    """Return the negative log likelihood of every next token that is text, in nats.

    In float32 or wider; padding is False in `real`. Instead of the mean, `per_token` gives the loss
    of each next token, and `not_counted` where that is padding or visual.
    """
    counted = (real & ~is_image)[:, 1:] & real[:, :-1]
    targets = tokens[:, 1:].masked_fill(~counted, 0)
    wide = float32_or_wider(logits)[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(wide, targets, reduction="none")
    if per_token:
        return losses.masked_fill(~counted, not_counted)
    return losses[counted].mean()
