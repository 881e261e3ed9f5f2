"""Keys and values of positions that were computed before."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor, cat

Keys = Float[Tensor, "batch pos kv_head d_head"]
AllKeys = Float[Tensor, "batch past_and_pos kv_head d_head"]


class KeyValueCache:
    """Per layer, the (rotated) keys and the values of all positions so far.

    A growing cache serves generation: every forward pass adds its positions. A frozen one is the
    shared past of many runs: each attends to it, none adds to it. A past of n rows serves any
    multiple of n, over and over in the same order.

    Example:
        >>> cache = KeyValueCache(model.cfg.n_layers)
        >>> logits = model(prompt, past_kv_cache=cache)        # fills it
        >>> logits = model(next_token, past_kv_cache=cache)    # attends to the prompt
    """

    def __init__(self, n_layers: int) -> None:
        self.entries: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self.key_mask: Tensor | None = None
        """Bool [batch, pos], False at padding; None where nothing is padded."""
        self.frozen = False

    @classmethod
    def holding(
        cls, entries: Sequence[tuple[Tensor, Tensor]], attention_mask: Bool[Tensor, "batch pos"]
    ) -> KeyValueCache:
        """A frozen cache of these keys and values."""
        cache = cls(len(entries))
        cache.entries = list(entries)
        cache.key_mask = None if bool(attention_mask.all()) else attention_mask
        cache.frozen = True
        return cache

    def __len__(self) -> int:
        """Number of positions held."""
        return next((entry[0].shape[1] for entry in self.entries if entry is not None), 0)

    def extend(self, layer: int, keys: Keys, values: Keys) -> tuple[AllKeys, AllKeys]:
        """Keys and values of all positions at `layer`: those held, then the given ones."""
        past = self.entries[layer]
        if past is not None:
            keys = cat([for_rows(past[0], len(keys)), keys], dim=1)
            values = cat([for_rows(past[1], len(values)), values], dim=1)
        if not self.frozen:
            self.entries[layer] = (keys, values)
        return keys, values

    def prefix(self, n_pos: int) -> KeyValueCache:
        """A frozen view of the first `n_pos` positions; nothing is copied.

        Raises:
            ValueError: there are fewer positions than that.
        """
        if n_pos > len(self):
            raise ValueError(f"a prefix of {n_pos} positions of a cache that holds {len(self)}")
        view = KeyValueCache(len(self.entries))
        if n_pos:
            view.entries = [
                None if entry is None else (entry[0][:, :n_pos], entry[1][:, :n_pos])
                for entry in self.entries
            ]
        if self.key_mask is not None:
            view.key_mask = self.key_mask[:, :n_pos]
        view.frozen = True
        return view


def for_rows(past: Tensor, rows: int) -> Tensor:
    """`past` over and over until there are `rows` of it; a single row is not copied.

    Raises:
        ValueError: `rows` is no multiple of the rows of `past`.
    """
    if len(past) in (1, rows):
        return past.expand(rows, *past.shape[1:])
    if rows % len(past):
        raise ValueError(
            f"a cache of {len(past)} rows serves a multiple of as many rows, and not {rows}"
        )
    return past.repeat(rows // len(past), *[1] * (past.ndim - 1))
