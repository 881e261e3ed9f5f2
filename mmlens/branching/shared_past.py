"""Attention of many continuations to one past, in place.

Continuations of a finished run are packed: one after the other along the position axis of one row,
each from its own first position to the last. All their queries attend to the past that they share
as one long sequence, whose keys and values are neither copied nor repeated (the query heads that
share keys are folded into that axis as well); each attends to its own keys besides. Softmax over
both parts together follows from the two outputs and the logarithms of their normalisers:

    z = z_own + (z_past - z_own) * sigmoid(lse_past - lse_own)

as in FlashAttention's splitting over keys (Dao et al. 2022, section 3.1; "cascade" attention over
shared prefixes in serving engines is the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.branching.packing import OnEachDevice, Packing
from mmlens.model.components.attention_rule import AttentionRule, Places
from mmlens.model.components.partial_attention import attend_part, attention_scores, weighted_values
from mmlens.model.components.past import Weigh

KeysValues = tuple[Tensor, Tensor]
Queries = Float[Tensor, "row kept head d_head"]
Keys = Float[Tensor, "row packed kv_head d_head"]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """Keys and values of a finished run, for continuations of it."""

    origin: int
    """Positions before this are attended to in place, by all; from here on each continuation has
    its own, those before its start filled in from the run."""
    places: Places
    """Of all positions, those of the continuations included."""
    prefix: Sequence[KeysValues]
    """Per layer, what lies before `origin`; one row, or one per row of the packed activations."""
    base: Sequence[KeysValues]
    """Per layer, what the run has from `origin` on."""
    _masks: dict[Any, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def masks(
        self, rule: AttentionRule, device: torch.device
    ) -> tuple[Bool[Tensor, "rows own_or_1 origin"] | None, Bool[Tensor, "rows own own"]]:
        """Where a query from `origin` on attends: in the prefix (None: everywhere), and after."""
        if (rule, device) not in self._masks:
            places = self.places.to(device)
            seen = rule.mask(places[self.origin :], places)
            before, own = seen.tensor_split([self.origin], dim=-1)
            if bool((before == before[:, :1]).all()):
                before = before[:, :1]  # the same for every query, so long as no window ends there
            self._masks[rule, device] = (None if bool(before.all()) else before, own)
        return self._masks[rule, device]


@dataclass(frozen=True, eq=False)
class SharedPast:
    """A finished run as the `Past` of packed continuations."""

    run: FinishedRun
    keys: Packing
    queries: Packing
    """Fewer than `keys` where only some positions are still needed."""

    def kept(self, x: Float[Tensor, "row packed *rest"]) -> Float[Tensor, "row kept *rest"]:
        """Return `x` at the entries that are still needed."""
        return x if self._kept is None else x[:, self._kept[x.device]]

    @cached_property
    def _kept(self) -> OnEachDevice | None:
        """Which entries of `keys` are those of `queries`; None where all are."""
        same = self.keys.starts == self.queries.starts
        return None if same else OnEachDevice(self.keys.entries_of(self.queries))

    @cached_property
    def _filling(self) -> OnEachDevice | None:
        """Where each continuation's own keys lie; None where they lie in a rectangle already."""
        if self.keys.is_rectangle and self.keys.first == self.run.origin:
            return None
        n_base = self.run.base[0][0].shape[1]
        return OnEachDevice(self.keys.filling(self.run.origin, n_base))

    @cached_property
    def _queries_after_origin(self) -> OnEachDevice:
        return OnEachDevice(self.queries.positions.made - self.run.origin)

    def attend(
        self, layer: int, q: Queries, k: Keys, v: Keys, rule: AttentionRule, weigh: Weigh | None
    ) -> Queries:
        """Return the heads' outputs of every packed query; patterns have a key per position."""
        if weigh is not None:
            pattern = weigh(self.scores(layer, q, k, rule), self.mask(rule, q.device))
            if pattern is not None:
                return self.weighted(layer, pattern, v).to(q.dtype)
        before, own = self.run.masks(rule, q.device)
        own_k, own_v = self._own(layer, k, v)
        n = own_k.shape[1]
        wide = self.queries.rectangle(q)
        own = own[:, self.queries.first - self.run.origin :]
        z, lse = attend_part(
            wide.flatten(0, 1),
            own_k.flatten(0, 1),
            own_v.flatten(0, 1),
            own if len(own) == 1 else own.repeat_interleave(n, dim=0),
            rule,
        )
        z = self.queries.flat(z.unflatten(0, (-1, n)))
        if not self.run.origin:
            return z
        lse = self.queries.flat(lse.unflatten(0, (-1, n)))
        past_k, past_v = self.run.prefix[layer]
        if before is not None and before.shape[1] > 1:
            before = before[:, self._queries_after_origin[before.device]]
        together = len(past_k) == 1 and (before is None or len(before) == 1)
        # All rows share one prefix: their queries are one sequence, too.
        rows = q.flatten(0, 1)[None] if together else q
        if together and before is not None and before.shape[1] > 1:
            before = before.repeat(1, len(q), 1)
        past_z, past_lse = attend_part(rows, past_k, past_v, before, rule)
        past_z, past_lse = past_z.view_as(z), past_lse.view_as(lse)
        weight = torch.sigmoid(past_lse - lse)[..., None]
        return torch.lerp(z.to(weight.dtype), past_z.to(weight.dtype), weight).to(q.dtype)

    def mask(self, rule: AttentionRule, device: torch.device) -> Bool[Tensor, "rows 1 kept pos"]:
        """What every packed query may attend to, over all positions."""
        before, own = self.run.masks(rule, device)
        if before is None:
            before = own.new_ones(1, 1, self.run.origin)
        rows, n_queries = max(len(before), len(own)), own.shape[1]
        both = [part.expand(rows, n_queries, -1) for part in (before, own)]
        return torch.cat(both, dim=-1)[:, None, self._queries_after_origin[own.device]]

    def scores(
        self, layer: int, q: Queries, k: Keys, rule: AttentionRule
    ) -> Float[Tensor, "row head kept pos"]:
        """Return every packed query's scores for the keys of all positions, nothing masked."""
        past_k, own_k = self.run.prefix[layer][0], self._own(layer, k, k)[0]
        wide = self.queries.rectangle(q)
        own = attention_scores(wide.flatten(0, 1), own_k.flatten(0, 1), rule)
        own = self.queries.flat(own.transpose(1, 2).unflatten(0, wide.shape[:2])).transpose(1, 2)
        before = attention_scores(q, past_k.expand(len(q), *past_k.shape[1:]), rule)
        return torch.cat([before, own], dim=-1)

    def weighted(
        self, layer: int, pattern: Float[Tensor, "row head kept pos"], v: Keys
    ) -> Float[Tensor, "row kept head d_head"]:
        """Return the values of all positions, weighted by a pattern, in float32 or wider."""
        past_v, own_v = self.run.prefix[layer][1], self._own(layer, v, v)[1]
        before, own = pattern.tensor_split([self.run.origin], dim=-1)
        wide = self.queries.rectangle(own.transpose(1, 2))
        z = weighted_values(wide.flatten(0, 1).transpose(1, 2), own_v.flatten(0, 1))
        z = self.queries.flat(z.unflatten(0, wide.shape[:2]))
        return z + weighted_values(before, past_v.expand(len(v), *past_v.shape[1:]))

    def _own(self, layer: int, k: Keys, v: Keys) -> KeysValues:
        own_k, own_v = map(self._filled, (k, v), self.run.base[layer])
        return own_k, own_v

    def _filled(
        self, packed: Keys, base: Float[Tensor, "rows held kv_head d_head"]
    ) -> Float[Tensor, "row continuation own kv_head d_head"]:
        """Return a row for each continuation, from `origin` on."""
        if self._filling is None:
            return packed.unflatten(1, (len(self.keys.starts), -1))
        base = base.expand(len(packed), *base.shape[1:])
        return torch.cat([base, packed], dim=1)[:, self._filling[packed.device]]
