"""Keys and values of positions that were computed before."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.inputs.rope_positions import counted
from mmlens.model.run_positions import computing, current_pass
from mmlens.utils.temporary import Changes, temporary

F = TypeVar("F", bound=Callable[..., Any])
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
        self.rope_positions: Tensor | None = None
        """Int [3, batch, pos] where images have rows and columns (M-RoPE); else None."""
        self.frozen = False

    @classmethod
    def holding(
        cls,
        entries: Sequence[tuple[Tensor, Tensor]],
        attention_mask: Bool[Tensor, "batch pos"],
        rope_positions: Int[Tensor, "axis batch pos"] | None = None,
    ) -> KeyValueCache:
        """A frozen cache of these keys and values."""
        cache = cls(len(entries))
        cache.entries = list(entries)
        cache.key_mask = None if bool(attention_mask.all()) else attention_mask
        if rope_positions is not None and len(rope_positions) > 1:
            cache.rope_positions = rope_positions
        cache.frozen = True
        return cache

    def __len__(self) -> int:
        """Number of positions held."""
        return next((entry[0].shape[1] for entry in self.entries if entry is not None), 0)

    def next_position(self) -> Int[Tensor, "batch 1"] | int:
        """The rotary position of the token after those that are held."""
        if self.rope_positions is not None and self.rope_positions.shape[2]:
            return self.rope_positions.amax(dim=(0, 2))[:, None] + 1
        return len(self) if self.key_mask is None else self.key_mask.sum(dim=1, keepdim=True)

    def place(self, positions: Int[Tensor, "axis batch pos"]) -> None:
        """Note the rotary positions of what is about to be added.

        Nothing is noted while they are those that one would count.
        """
        if self.rope_positions is None and len(positions) == 1:
            return
        if self.rope_positions is None:
            held = torch.ones(positions.shape[1], len(self), dtype=torch.bool)
            held = held if self.key_mask is None else for_rows(self.key_mask, len(held))
            self.rope_positions = counted(held.to(positions.device))[None].expand(3, -1, -1)
        parts = [for_rows(self.rope_positions.transpose(0, 1), positions.shape[1]).transpose(0, 1)]
        parts.append(positions.expand(3, *positions.shape[1:]))
        self.rope_positions = torch.cat([part.to(positions) for part in parts], dim=2)

    def extend(self, layer: int, keys: Keys, values: Keys) -> tuple[AllKeys, AllKeys]:
        """Keys and values of all positions at `layer`: those held, then the given ones."""
        past = self.entries[layer]
        if past is not None:
            keys = torch.cat([for_rows(past[0], len(keys)), keys], dim=1)
            values = torch.cat([for_rows(past[1], len(values)), values], dim=1)
        if not self.frozen:
            self.entries[layer] = (keys, values)
        return keys, values

    def prefix(self, n_pos: int) -> KeyValueCache:
        """A frozen view of the first `n_pos` positions; nothing is copied.

        Raises:
            ValueError: there are fewer positions than that, or it is negative.
        """
        if not 0 <= n_pos <= len(self):
            raise ValueError(
                f"a prefix of {n_pos} positions of a cache that holds {len(self)}: it has 0 ... "
                f"{len(self)} of them"
            )
        view = KeyValueCache(len(self.entries))
        view.frozen = True
        if not n_pos:  # nothing of any row, which serves every number of rows
            return view
        view.entries = [
            None if entry is None else (entry[0][:, :n_pos], entry[1][:, :n_pos])
            for entry in self.entries
        ]
        if self.key_mask is not None:
            view.key_mask = self.key_mask[:, :n_pos]
        if self.rope_positions is not None:
            view.rope_positions = self.rope_positions[..., :n_pos]
        return view

    def check_layers(self, layers: Sequence[int]) -> None:
        """Check that each of these layers, which are about to run, holds every position.

        Raises:
            ValueError: earlier runs left out some of them.
        """
        held = [0 if entry is None else entry[0].shape[1] for entry in self.entries]
        if {held[layer] for layer in layers} - {len(self)}:
            raise ValueError(
                f"past_kv_cache holds {held} positions in layers 0 ... {len(held) - 1}, and layers "
                f"{layers[0]} ... {layers[-1]} are to run after {len(self)}: a run with "
                "start_at_layer or stop_at_layer fills only its own layers. Begin with a new "
                "KeyValueCache(model.cfg.n_layers), and run the same layers with it every time"
            )

    def put_back(
        self,
        entries: Sequence[tuple[Tensor, Tensor] | None],
        key_mask: Tensor | None,
        rope_positions: Tensor | None,
    ) -> None:
        """Hold these again, and nothing that was added since."""
        self.entries = list(entries)
        self.key_mask, self.rope_positions = key_mask, rope_positions


def for_rows(past: Tensor, rows: int) -> Tensor:
    """`past` over and over until there are `rows` of it; a single row is not copied."""
    if len(past) in (1, rows):
        return past.expand(rows, *past.shape[1:])
    if rows % len(past):
        raise ValueError(
            f"a cache of {len(past)} rows serves a multiple of as many rows, and not {rows}"
        )
    return past.repeat(rows // len(past), *[1] * (past.ndim - 1))


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


def check_cache(cache: Any, n_layers: int) -> None:
    """Raise an error where `past_kv_cache` is no cache of a model with `n_layers` layers."""
    if not isinstance(cache, KeyValueCache):
        kind = f"{type(cache).__module__.split('.')[0]}.{type(cache).__name__}"
        raise TypeError(
            f"past_kv_cache is a {kind}; this model fills and reads a mmlens.KeyValueCache: make "
            "one with KeyValueCache(model.cfg.n_layers), run the earlier tokens with "
            "model(tokens, past_kv_cache=cache), and then the later ones with the same cache"
        )
    if len(cache.entries) != n_layers:
        raise ValueError(
            f"past_kv_cache has {len(cache.entries)} layers, and this model {n_layers}: make one "
            "with KeyValueCache(model.cfg.n_layers)"
        )


@temporary
def added_whole(cache: KeyValueCache) -> Changes[Callable[[], None]]:
    """Put a cache back as it was, unless what runs inside says at its end that all was added."""
    before = (list(cache.entries), cache.key_mask, cache.rope_positions)
    unfinished = [before]

    def undo() -> None:
        for each in unfinished:
            cache.put_back(*each)

    yield undo
    return unfinished.clear


def continuing(forward: F) -> F:
    """Let a model's `forward` check its cache, and note that it computes the positions after it.

    A pass that fails, or that runs no layer, adds nothing to the cache.
    """

    @functools.wraps(forward)
    def run(self: Any, *args: Any, past_kv_cache: Any = None, **kwargs: Any) -> Any:
        around = current_pass()  # generation knows how long the text will be
        if past_kv_cache is None:
            with computing(0, around.total, around.prompt):
                return forward(self, *args, **kwargs)
        check_cache(past_kv_cache, self.cfg.n_layers)
        total = around.total or (0 if past_kv_cache.frozen else math.inf)
        held = list(past_kv_cache.entries)
        with (
            computing(len(past_kv_cache), total, around.prompt),
            added_whole(past_kv_cache) as finish,
        ):
            out = forward(self, *args, past_kv_cache=past_kv_cache, **kwargs)
            if any(map(operator.is_not, past_kv_cache.entries, held)):
                finish()
            return out

    return run  # type: ignore[return-value]
