"""What an edit adds to a weight: a tensor of its shape, or the factors of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Delta", "LowRank", "added", "delta_is_finite", "dense", "total"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix by its factors: left @ right."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself."""
        return self.left @ self.right


Delta = LowRank | Tensor
"""What is added to a weight: factors, or a tensor of the weight's shape."""


def delta_is_finite(delta: Delta) -> bool:
    """Whether a delta holds neither NaN nor infinities."""
    parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta,)
    return all(bool(part.isfinite().all()) for part in parts)


def added(weight: Float[Tensor, "*shape"], delta: Delta) -> Float[Tensor, "*shape"]:
    """The sum, computed in float32 at least and rounded once, to the weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(delta, LowRank):
        delta = LowRank(*(part.to(weight.device, wide) for part in (delta.left, delta.right)))
    return (weight.to(wide) + dense(delta).to(weight.device, wide)).to(weight.dtype)


def dense(delta: Delta) -> Tensor:
    """A delta as one tensor."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def total(one: Delta, other: Delta) -> Delta:
    """The sum of two deltas of one weight, in the wider of their dtypes."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        dtype = torch.promote_types(one.left.dtype, other.left.dtype)
        left, right = other.left.to(one.left.device, dtype), other.right.to(one.left.device, dtype)
        return LowRank(
            torch.cat([one.left.to(dtype), left], dim=1),
            torch.cat([one.right.to(dtype), right], dim=0),
        )
    return dense(one) + dense(other).to(dense(one).device)
