"""The loss of a language model that sees pictures: text alone is predicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmlens.inputs import MultimodalInputs


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], inputs: MultimodalInputs, per_token: bool
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_but_first"]:
    """Negative log likelihood of every next token that is text, in nats."""
    targets = inputs.tokens[:, 1:]
    is_text = (inputs.attention_mask & ~inputs.is_image)[:, 1:] & inputs.attention_mask[:, :-1]
    targets = targets.masked_fill(~is_text, 0)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, reduction="none")
    if per_token:
        return losses.masked_fill(~is_text, torch.nan)
    return losses[is_text].mean()
