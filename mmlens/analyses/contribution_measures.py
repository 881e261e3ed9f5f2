"""How a contribution is spread over its sources, such as the visual tokens, and over layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PART = 16
"""The last and the largest 1 / PART of the visual tokens are counted."""
MEASURES = ("total", "late share", "largest share", "tokens for half", "layer's part")


def measures(contribution: Float[Tensor, "layer token"]) -> Float[Tensor, "layer measure"]:
    """Of one question: `MEASURES`.

    The total over visual tokens; what the last and the largest sixteenth hold of it; how many of
    the largest hold half of it; and the layer's part in the sum over layers.
    """
    total = contribution.sum(dim=-1)
    part = max(1, contribution.shape[-1] // PART)
    ordered = contribution.sort(dim=-1, descending=True).values
    late = contribution[:, -part:].sum(dim=-1) / total
    largest = ordered[:, :part].sum(dim=-1) / total
    half = (ordered.cumsum(dim=-1) < total[:, None] / 2).sum(dim=-1) + 1
    return torch.stack([total, late, largest, half.double(), total / total.sum()], dim=-1)
