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
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.components.partial_attention import attend_part, fold, unfold
from mmlens.transfer import to_device

KeysValues = tuple[Tensor, Tensor]
Queries = Float[Tensor, "row kept head d_head"]
Keys = Float[Tensor, "row packed kv_head d_head"]


class Packing:
    """Where continuations lie that are packed one after the other.

    Continuation `i` holds the positions `starts[i] ... n_pos - 1`, at
    `offsets[i] ... offsets[i + 1] - 1` of the packed axis.

    Example:
        >>> Packing([2, 3], n_pos=5).positions(torch.device("cpu"))
        tensor([2, 3, 4, 3, 4])
    """

    def __init__(self, starts: Sequence[int], n_pos: int) -> None:
        self.starts = tuple(starts)
        self.n_pos = n_pos
        self.offsets = (0, *accumulate(n_pos - start for start in starts))
        self.first = min(starts)
        self.is_rectangle = self.first == max(starts)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts and offsets as columns, the positions from the first on as a row."""
        columns = torch.tensor([self.starts, self.offsets[:-1]])[:, :, None]
        return columns[0], columns[1], torch.arange(self.first, self.n_pos)[None]

    def _index(self, name: str, device: torch.device) -> Tensor:
        """One of the index tensors below; made once, and moved to each device once."""
        if (name, device) not in self._on_device:
            starts, offsets, position = self._grid
            inside = position >= starts
            made = {
                "positions": lambda: position.expand_as(inside)[inside],
                "to_rectangle": lambda: offsets + (position - starts).clamp(min=0),
                "from_rectangle": lambda: inside.flatten().nonzero()[:, 0],
            }[name]()
            self._on_device[name, device] = to_device(made, device)
        return self._on_device[name, device]

    def positions(self, device: torch.device) -> Int[Tensor, " packed"]:
        """The position of every packed entry."""
        return self._index("positions", device)

    def entries_of(self, later: Packing, device: torch.device) -> Int[Tensor, " kept"] | None:
        """Which entries are those of a packing that begins later; None where it is the same."""
        if later.starts == self.starts:
            return None
        starts, _, position = self._grid
        wanted = position >= torch.tensor(later.starts)[:, None]
        return to_device(wanted[position >= starts].nonzero()[:, 0], device)

    def rectangle(
        self, packed: Float[Tensor, "row packed *shape"]
    ) -> Float[Tensor, "row continuation wide *shape"]:
        """One row per continuation, from `first` on; what lies before its start means nothing."""
        if self.is_rectangle:
            return packed.unflatten(1, (len(self.starts), -1))
        return packed[:, self._index("to_rectangle", packed.device)]

    def flat(
        self, rectangle: Float[Tensor, "row continuation wide *shape"]
    ) -> Float[Tensor, "row packed *shape"]:
        """The inverse of `rectangle`."""
        packed = rectangle.flatten(1, 2)
        if self.is_rectangle:
            return packed
        return packed[:, self._index("from_rectangle", packed.device)]

    def filled(
        self,
        packed: Float[Tensor, "row packed *shape"],
        base: Float[Tensor, "row held *shape"],
        origin: int,
    ) -> Float[Tensor, "row continuation own *shape"]:
        """One row per continuation, from `origin` on; `base` is what lies before its start."""
        if self.is_rectangle and self.first == origin:
            return packed.unflatten(1, (len(self.starts), -1))
        index = self._filling(base.shape[1], origin, base.device)
        return torch.cat([base, packed], dim=1)[:, index]

    def _filling(
        self, n_base: int, origin: int, device: torch.device
    ) -> Int[Tensor, "continuation own"]:
        """Where the entries of `filled` are in `base` and what is packed, one behind the other."""
        name = f"filling {n_base} {origin}"
        if (name, device) not in self._on_device:
            starts, offsets, _ = self._grid
            position = torch.arange(origin, self.n_pos)[None]
            own = n_base + offsets + position - starts
            index = torch.where(position < starts, position - origin, own)
            self._on_device[name, device] = to_device(index, device)
        return self._on_device[name, device]


@dataclass(eq=False)
class SharedPast:
    """Keys and values of a finished run, and the continuations that attend to them.

    The engine sets `keys` and `queries` as continuations join, and hands this to every layer in
    place of a `KeyValueCache`.
    """

    origin: int
    """Positions before this are attended to in place, by all; from here on each continuation has
    its own, those before its start filled in from the run."""
    n_pos: int
    prefix: Sequence[KeysValues]
    """Per layer, what lies before `origin`; one row, or one per row of the packed activations."""
    base: Sequence[KeysValues]
    """Per layer, what the run has from `origin` on."""
    key_mask: Bool[Tensor, "rows pos"] | None
    """False at padding; None where nothing is padded."""
    keys: Packing = field(init=False)
    queries: Packing = field(init=False)
    """Fewer than `keys` where only some positions are still needed."""
    _masks: dict[Any, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def masks(
        self, window: int | None, device: torch.device
    ) -> tuple[Bool[Tensor, "rows own_or_1 origin"] | None, Bool[Tensor, "rows own own"]]:
        """Where a query from `origin` on may look: in the prefix (None: everywhere), and behind."""
        if (window, device) not in self._masks:
            position = torch.arange(self.n_pos, device=device)
            query = position[self.origin :, None]
            allowed = (position <= query)[None]
            if window is not None:
                allowed = allowed & (position > query - window)
            if self.key_mask is not None:
                real = self.key_mask.to(device)[:, None, :]
                # A padded query looks at itself, as everywhere: softmax over nothing is NaN.
                allowed = (allowed & real) | ((position == query) & ~real)
            before, own = allowed.split([self.origin, self.n_pos - self.origin], dim=-1)
            if bool((before == before[:, :1]).all()):
                before = before[:, :1]  # the same for every query, so long as no window ends there
            self._masks[window, device] = (None if bool(before.all()) else before, own)
        return self._masks[window, device]

    def attend(self, layer: int, q: Queries, k: Keys, v: Keys, window: int | None) -> Queries:
        """The heads' outputs of every packed query."""
        before, own = self.masks(window, q.device)
        own_k, own_v = self._own(layer, k, v)
        n = own_k.shape[1]
        wide = self.queries.rectangle(q)
        own = own[:, self.queries.first - self.origin :]
        z, lse = attend_part(
            wide.flatten(0, 1),
            own_k.flatten(0, 1),
            own_v.flatten(0, 1),
            own if len(own) == 1 else own.repeat_interleave(n, dim=0),
        )
        z = self.queries.flat(z.unflatten(0, (-1, n)))
        if not self.origin:
            return z
        lse = self.queries.flat(lse.unflatten(0, (-1, n)))
        past_k, past_v = self.prefix[layer]
        if before is not None and before.shape[1] > 1:
            before = before[:, self._queries_behind_origin(before.device)]
        together = len(past_k) == 1 and (before is None or len(before) == 1)
        # All rows share one prefix: their queries are one sequence, too.
        rows = q.flatten(0, 1)[None] if together else q
        if together and before is not None and before.shape[1] > 1:
            before = before.repeat(1, len(q), 1)
        past_z, past_lse = attend_part(rows, past_k, past_v, before)
        past_z, past_lse = past_z.view_as(z), past_lse.view_as(lse)
        weight = torch.sigmoid(past_lse - lse)[..., None]
        return torch.lerp(z.to(weight.dtype), past_z.to(weight.dtype), weight).to(q.dtype)

    def mask(self, window: int | None, device: torch.device) -> Bool[Tensor, "rows 1 kept pos"]:
        """Where every packed query may look, over all positions."""
        before, own = self.masks(window, device)
        if before is None:
            before = own.new_ones(1, 1, self.origin)
        rows, n_queries = max(len(before), len(own)), own.shape[1]
        both = [part.expand(rows, n_queries, -1) for part in (before, own)]
        return torch.cat(both, dim=-1)[:, None, self._queries_behind_origin(own.device)]

    def scores(self, layer: int, q: Queries, k: Keys) -> Float[Tensor, "row head kept pos"]:
        """Every packed query's product with the keys of all positions, not yet scaled."""
        past_k, own_k = self.prefix[layer][0], self._own(layer, k, k)[0]
        folded = fold(self.queries.rectangle(q).flatten(0, 1), own_k.shape[-2])
        own = folded @ own_k.flatten(0, 1).permute(0, 2, 3, 1)
        own = unfold(own, q.shape[2]).unflatten(0, (len(q), -1))
        own = self.queries.flat(own).transpose(1, 2)
        before = fold(q, past_k.shape[-2]) @ past_k.permute(0, 2, 3, 1)
        return torch.cat([unfold(before, q.shape[2]).transpose(1, 2), own], dim=-1)

    def weighted(self, layer: int, pattern: Float[Tensor, "row head kept pos"], v: Keys) -> Queries:
        """The values of all positions, weighted by a pattern."""
        past_v, own_v = self.prefix[layer][1], self._own(layer, v, v)[1]
        n_kv_heads, n_heads = own_v.shape[-2], pattern.shape[1]
        before, own = pattern.transpose(1, 2).tensor_split([self.origin], dim=-1)
        own = fold(self.queries.rectangle(own).flatten(0, 1), n_kv_heads)
        z = unfold(own @ own_v.flatten(0, 1).transpose(1, 2), n_heads)
        z = self.queries.flat(z.unflatten(0, (len(pattern), -1)))
        return z + unfold(fold(before, n_kv_heads) @ past_v.transpose(1, 2), n_heads)

    def _queries_behind_origin(self, device: torch.device) -> Int[Tensor, " packed"]:
        return self.queries.positions(device) - self.origin

    def _own(self, layer: int, k: Keys, v: Keys) -> KeysValues:
        base_k, base_v = (part.expand(len(k), *part.shape[1:]) for part in self.base[layer])
        return (
            self.keys.filled(k, base_k, self.origin),
            self.keys.filled(v, base_v, self.origin),
        )
