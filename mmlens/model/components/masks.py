"""Where queries may look."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmlens.model.components.key_value_cache import KeyValueCache, for_rows


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """True where a query may look; the queries are the last `n_queries` of `n_keys` positions."""
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.tril(diagonal=n_keys - n_queries)


def window_mask(
    n_queries: int, n_keys: int, window: int, device: torch.device
) -> Bool[Tensor, "query key"]:
    """True where a key is at most `window - 1` positions back (Mistral, Jiang et al. 2023, 2)."""
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.triu(diagonal=n_keys - n_queries - window + 1)


def keys_mask(
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None,
    cache: KeyValueCache | None,
    n_rows: int,
    n_new: int,
    device: torch.device,
) -> Bool[Tensor, "rows key"] | None:
    """Which keys are no padding, those of the cache first; None where all of them.

    One row serves all rows, as the samples of a noisy prompt share its mask.
    """
    new = None if attention_mask is None else attention_mask.bool()
    if new is not None and bool(new.all()):
        new = None
    past = None if cache is None else cache.key_mask
    if new is None and past is None:
        return None
    several = any(len(part) > 1 for part in (new, past) if part is not None)
    rows = n_rows if several else 1
    n_past = 0 if cache is None else len(cache)
    everything = torch.ones(rows, n_past + n_new, dtype=torch.bool, device=device)
    past = everything[:, :n_past] if past is None else for_rows(past, rows)
    new = everything[:, n_past:] if new is None else for_rows(new, rows)
    return torch.cat([past, new], dim=1)


def padded_mask(
    key_mask: Bool[Tensor, "rows key"], n_queries: int
) -> Bool[Tensor, "rows 1 query key"]:
    """Causal, without the padding; a padded query looks at itself: softmax of nothing is NaN."""
    n_keys = key_mask.shape[1]
    causal = causal_mask(n_queries, n_keys, key_mask.device)
    itself = causal.triu(diagonal=n_keys - n_queries)
    return ((causal & key_mask[:, None, :]) | (itself & ~key_mask[:, None, :]))[:, None]
