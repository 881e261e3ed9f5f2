"""`AttentionRule`: who may attend to whom in the layers of one kind, and what scores are there.

A model has one rule for each kind of its layers ("global", "local"), in `model.rules`. Whoever asks
which positions a query attends to, or which positions an edit can change, asks the rule; nothing
else assumes that attention is causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.config import MultimodalConfig, TransformerConfig
from mmlens.model.components.embedding import capped
from mmlens.model.components.rotary import Rotary

Mask = Bool[Tensor, "rows query key"]


@dataclass(frozen=True, eq=False)
class Places:
    """The positions of a run, with what rules ask about them."""

    position: Int[Tensor, " pos"]
    real: Bool[Tensor, "rows pos"] | None = None
    """False at padding; None where nothing is padded."""
    block: Int[Tensor, "some pos"] | None = None
    """Those of one number (0 or more) form a block, -1 is none; see `MultimodalInputs.blocks`."""

    @classmethod
    def of(
        cls, mask: Bool[Tensor, "rows pos"], blocks: Int[Tensor, "some pos"] | None = None
    ) -> Places:
        """Return those of inputs, from their `attention_mask` and `blocks`."""
        position = torch.arange(mask.shape[1], device=mask.device)
        return cls(position, None if bool(mask.all()) else mask, blocks)

    def __getitem__(self, at: slice | Int[Tensor, " chosen"]) -> Places:
        at = at if isinstance(at, slice) else at.to(self.position.device)
        real, block = (None if part is None else part[:, at] for part in (self.real, self.block))
        return Places(self.position[at], real, block)

    def to(self, device: torch.device) -> Places:
        """Return the same on another device."""
        real, block = (
            None if part is None else part.to(device) for part in (self.real, self.block)
        )
        return Places(self.position.to(device), real, block)

    @cached_property
    def block_starts(self) -> list[int] | None:
        """For every position the first one of its block, in any row; None without blocks.

        A list, so that whoever looks up many positions doesn't wait for a GPU.
        """
        if self.block is None:
            return None
        starts = list(range(len(self.position)))
        for row in self.block.tolist():
            first: dict[int, int] = {}
            for at, number in enumerate(row):
                if number >= 0:
                    starts[at] = min(starts[at], first.setdefault(number, at))
        return starts


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """Who attends to whom, and the scores: q k / `1 / scale`, capped, masked.

    Example:
        >>> rule = AttentionRule(scale=8**-0.5, window=2)
        >>> rule.mask(places := Places(torch.arange(3)), places)[0]
        tensor([[ True, False, False],
                [ True,  True, False],
                [False,  True,  True]])
    """

    scale: float
    """What products of queries and keys are multiplied by."""
    softcap: float | None = None
    """Scores s become c tanh(s / c), so that none is larger (Gemma 2; Gemma Team 2024, 2)."""
    window: int | None = None
    """How many positions a query sees, itself included; None is all (Mistral; Jiang et al. 2023,
    2). In a tower, the side of a window of patches."""
    blocks: Literal["image", "prompt"] | None = None
    """What attends to itself in both directions: each image, as far as the window reaches (Gemma 3;
    Gemma Team 2025), or the prompt with its images, whatever the window (PaliGemma; Beyer et al.
    2024, 3.2.1). Sources: transformers, `modeling_gemma3.py`, `modeling_paligemma.py`."""
    rotary: Rotary | None = None

    @classmethod
    def of_tower(cls, cfg: TransformerConfig, layer: int = 0) -> AttentionRule:
        """Return that of a vision tower's layer, whose `Past` says who attends to whom."""
        return cls(1 / cfg.attn_scale, cfg.scores_softcap, cfg.window(layer))

    @classmethod
    def of_decoder(cls, cfg: MultimodalConfig) -> dict[str, AttentionRule]:
        """Return those of a decoder's layers, by their kind."""
        rotary = {"global": Rotary(cfg, cfg.rope_parameters)}
        rotary["local"] = rotary["global"]
        if cfg.local_rope_parameters is not None:
            rotary["local"] = Rotary(cfg, cfg.local_rope_parameters)
        return {
            kind: cls(
                1 / cfg.attn_scale,
                cfg.scores_softcap,
                cfg.window_size if kind == "local" else None,
                cfg.attention_blocks,
                rotary[kind],
            )
            for kind in dict.fromkeys(cfg.attn_types or ("global",))
        }

    def is_plain(self, keys: Places) -> bool:
        """Whether each query attends to all keys up to its own position, and that is all."""
        near = self.window is None or len(keys.position) <= self.window
        return near and keys.real is None and (self.blocks is None or keys.block is None)

    def mask(self, queries: Places, keys: Places) -> Mask:
        """Return where queries may attend; padding attends to itself alone.

        Softmax over nothing would be NaN, and spread from padding to everything.
        """
        query, key = queries.position[:, None], keys.position
        seen = (key <= query)[None]
        near = torch.ones_like(seen) if self.window is None else key > query - self.window
        if self.blocks is None or queries.block is None or keys.block is None:
            seen = seen & near
        else:
            mine = queries.block[:, :, None]
            together = (mine == keys.block[:, None, :]) & (mine >= 0)
            seen = (seen | together) & near if self.blocks == "image" else (seen & near) | together
        if keys.real is not None:
            real = keys.real[:, None, :]
            seen = (seen & real) | ((key == query) & ~real)
        return seen

    def first_affected(self, position: int, places: Places) -> int:
        """Return the first position that attends, directly or not, to what is at a position."""
        starts = places.block_starts if self.blocks is not None else None
        return position if starts is None else starts[position]

    def scores(
        self, products: Float[Tensor, "*rows query key"]
    ) -> Float[Tensor, "*rows query key"]:
        """Return scores, made of products of queries and keys, which may be overwritten."""
        products = products.mul_(self.scale)
        return products if self.softcap is None else capped(products, self.softcap)
