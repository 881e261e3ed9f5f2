"""`Past`: which keys and values the queries of a run attend to.

A plain run attends to its own (`PlainPast`), a continued one to those of a cache besides
(`CachedPast`); the third kind is that of branches (`mmlens.branching.shared_past`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.model.components.key_value_cache import KeyValueCache
from mmlens.model.components.masks import causal_mask, window_mask
from mmlens.model.components.partial_attention import attention_scores, weighted_values

Queries = Float[Tensor, "row query head d_head"]
Keys = Float[Tensor, "row new kv_head d_head"]
Scores = Float[Tensor, "row head query key"]
Mask = Bool[Tensor, "rows 1 query key"]
Weigh = Callable[[Scores, Mask | None], Scores | None]
"""Makes attention weights of scores, which it may overwrite, and of where queries may look (None:
everywhere). It returns None where nothing but softmax was done to them."""


@runtime_checkable  # for the shapes that tests check
class Past(Protocol):
    """What queries attend to, besides the keys and values that are computed with them."""

    def kept(self, x: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "row query *rest"]:
        """Return `x` at the positions that have queries; the others have keys and values alone."""

    def attend(
        self, layer: int, q: Queries, k: Keys, v: Keys, window: int | None, weigh: Weigh | None
    ) -> Queries:
        """Return the heads' outputs of every query.

        Args:
            layer: which layer's past.
            window: how many positions a query sees, itself included; None is all.
            weigh: given where something listens to scores or weights, which are then computed.
        """


@dataclass(frozen=True, eq=False)
class PlainPast:
    """None: the queries attend to the positions that they are computed with."""

    mask: Mask | None = None
    """True where a query may look. None is every key, up to the query's own position if causal."""
    causal: bool = True

    def kept(self, x: Tensor) -> Tensor:
        """Return `x`: every position has a query."""
        return x

    def attend(
        self,
        layer: int,
        q: Queries,
        k: Float[Tensor, "row key kv_head d_head"],
        v: Float[Tensor, "row key kv_head d_head"],
        window: int | None,
        weigh: Weigh | None,
    ) -> Queries:
        """Return the heads' outputs of every query, whose positions are the last of the keys'."""
        n_queries, n_keys = q.shape[1], k.shape[1]

        def visible(mask: Mask | None) -> Mask | None:
            if mask is None and self.causal:
                return causal_mask(n_queries, n_keys, q.device)[None, None]
            return mask

        mask = None if self.mask is None else self.mask.to(q.device)
        if window is not None and n_keys > window:
            near = window_mask(n_queries, n_keys, window, q.device)
            seen = visible(mask)
            mask = near[None, None] if seen is None else seen & near
        if weigh is not None:
            pattern = weigh(attention_scores(q, k), visible(mask))
            if pattern is not None:
                return weighted_values(pattern, v).to(q.dtype)
        if 1 < n_queries < n_keys:  # the triangle of torch's kernel would lie top left
            mask = visible(mask)
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and mask is None and n_queries > 1,
            enable_gqa=k.shape[2] < q.shape[2],
        )
        return z.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class CachedPast(PlainPast):
    """A cache, to whose positions the queries attend, too; it grows unless it is frozen."""

    cache: KeyValueCache = field(kw_only=True)

    def attend(
        self, layer: int, q: Queries, k: Keys, v: Keys, window: int | None, weigh: Weigh | None
    ) -> Queries:
        """Return the heads' outputs of every query."""
        return super().attend(layer, q, *self.cache.extend(layer, k, v), window, weigh)
