"""`Past`: which keys and values the queries of a run attend to.

A decoder's plain run attends to its own (`PlainPast`), a continued one to those of a cache besides
(`CachedPast`), a tile of an image to itself (`TowerPast`); the fourth kind is that of branches
(`mmlens.branching.shared_past`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.model.components.attention_rule import AttentionRule, Places
from mmlens.model.components.key_value_cache import KeyValueCache
from mmlens.model.components.partial_attention import attention_scores, weighted_values

Queries = Float[Tensor, "row query head d_head"]
Keys = Float[Tensor, "row new kv_head d_head"]
Scores = Float[Tensor, "row head query key"]
Mask = Bool[Tensor, "rows 1 query key"]
Weigh = Callable[[Scores, Mask | None], Scores | None]
"""Makes attention weights of scores, which it may overwrite, and of what queries may attend to
(None: everything). It returns None where nothing but softmax was done to them."""


@runtime_checkable  # for the shapes that tests check
class Past(Protocol):
    """What queries attend to, besides the keys and values that are computed with them."""

    def kept(self, x: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "row query *rest"]:
        """Return `x` at the positions that have queries; the others have keys and values alone."""

    def attend(
        self, layer: int, q: Queries, k: Keys, v: Keys, rule: AttentionRule, weigh: Weigh | None
    ) -> Queries:
        """Return the heads' outputs of every query.

        Args:
            layer: which layer's past.
            rule: the layer's.
            weigh: given where something listens to scores or weights, which are then computed.
        """


def attended(
    q: Queries,
    k: Float[Tensor, "row key kv_head d_head"],
    v: Float[Tensor, "row key kv_head d_head"],
    rule: AttentionRule,
    weigh: Weigh | None = None,
    mask: Callable[[], Mask | None] = lambda: None,
    causal: bool = False,
) -> Queries:
    """Return the heads' outputs of queries that attend to these keys.

    Args:
        mask: makes the mask (None: everywhere), and isn't asked where a fused kernel does without.
        causal: whether the mask is a triangle, with the queries at the last positions.
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    if weigh is not None or rule.softcap is not None:
        scores, seen = attention_scores(q, k, rule), mask()
        pattern = None if weigh is None else weigh(scores, seen)
        if pattern is None and rule.softcap is not None:  # which no fused kernel takes
            hidden = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
            pattern = hidden.softmax(dim=-1)
        if pattern is not None:
            return weighted_values(pattern, v).to(q.dtype)
    fused = causal and n_queries in (1, n_keys)  # else the kernel's triangle would lie top left
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if fused else mask(),
        is_causal=fused and n_queries > 1,
        scale=rule.scale,
        enable_gqa=k.shape[2] < q.shape[2],
    )
    return z.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class PlainPast:
    """None: the queries attend to the positions that they are computed with, as their rule says."""

    places: Places
    """Of the keys; those of the queries are the last of them."""
    _masks: dict[Any, Mask] = field(default_factory=dict)

    def kept(self, x: Tensor) -> Tensor:
        """Return `x`: every position has a query."""
        return x

    def attend(
        self,
        layer: int,
        q: Queries,
        k: Float[Tensor, "row key kv_head d_head"],
        v: Float[Tensor, "row key kv_head d_head"],
        rule: AttentionRule,
        weigh: Weigh | None,
    ) -> Queries:
        """Return the heads' outputs of every query, whose positions are the last of the keys'."""

        def mask() -> Mask:
            if (rule, q.device) not in self._masks:
                places = self.places.to(q.device)
                queries = places[len(places.position) - q.shape[1] :]
                self._masks[rule, q.device] = rule.mask(queries, places)[:, None]
            return self._masks[rule, q.device]

        return attended(q, k, v, rule, weigh, mask, causal=rule.is_plain(self.places))


@dataclass(frozen=True, eq=False)
class CachedPast(PlainPast):
    """A cache, to whose positions the queries attend, too; it grows unless it is frozen."""

    cache: KeyValueCache = field(kw_only=True)

    def attend(
        self, layer: int, q: Queries, k: Keys, v: Keys, rule: AttentionRule, weigh: Weigh | None
    ) -> Queries:
        """Return the heads' outputs of every query."""
        return super().attend(layer, q, *self.cache.extend(layer, k, v), rule, weigh)


@dataclass(frozen=True, eq=False)
class TowerPast:
    """None, in a vision tower: each patch attends to those of its tile, before and after it."""

    mask: Mask | None = None
    """True where a query may attend; None is everywhere."""

    def kept(self, x: Tensor) -> Tensor:
        """Return `x`: every patch has a query."""
        return x

    def attend(
        self, layer: int, q: Queries, k: Keys, v: Keys, rule: AttentionRule, weigh: Weigh | None
    ) -> Queries:
        """Return the heads' outputs of every query."""
        mask = None if self.mask is None else self.mask.to(q.device)
        return attended(q, k, v, rule, weigh, lambda: mask)
