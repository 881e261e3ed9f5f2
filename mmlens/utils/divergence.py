"""The Kullback-Leibler divergence, in nats."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def divergence(
    expected: Float[Tensor, "*#row d_vocab"], found: Float[Tensor, "*#row d_vocab"]
) -> Float[Tensor, "*row"]:
    """Return KL(expected || found) of log probabilities.

    It is infinite where something is impossible that was expected, and NaN where one of them is.
    """
    probability = expected.exp()
    # 0 x (-inf - -inf) where a token is impossible in both.
    return (probability * (expected - found)).masked_fill(probability == 0, 0.0).sum(dim=-1)
