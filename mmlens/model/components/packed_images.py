"""Images of any grid in one row of patches: where each patch lies, and which attend to each other.

A grid is an image's rows and columns of patches; `places` lists the patches of all images, row by
row and one image after the other, which is the order of every hook point of a packed tower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from mmlens.inputs.visual import Visual
from mmlens.model.components.attention_rule import AttentionRule
from mmlens.model.components.partial_attention import attention_scores, weighted_values
from mmlens.model.components.past import Keys, Queries, Weigh, attended

Grids = Sequence[tuple[int, int]]


def grids_of(visual: Visual) -> list[tuple[int, int]]:
    """Return rows and columns of every image's patches.

    Raises:
        ValueError: a video, whose patches have a time besides.
    """
    times = visual["image_grid_thw"].tolist()
    if videos := [grid for grid in times if grid[0] != 1]:
        raise ValueError(
            f"image_grid_thw has {videos[0]}, an image of several frames; videos are not taken"
        )
    return [(rows, columns) for _, rows, columns in times]


def places(grids: Grids) -> Int[Tensor, "patch 3"]:
    """Return image, row and column of every patch."""
    found = [
        torch.cartesian_prod(torch.tensor([image]), torch.arange(rows), torch.arange(columns))
        for image, (rows, columns) in enumerate(grids)
    ]
    return torch.cat(found) if found else torch.zeros(0, 3, dtype=torch.long)


def squares(grids: Grids, side: int) -> Int[Tensor, "square patch"]:
    """Return which patches each square of side x side has, row by row, as the squares lie.

    In the order of transformers' `pixel_values`, the patches of a square come after one another.
    """
    found, first = [], 0
    for rows, columns in grids:
        numbers = torch.arange(first, first + rows * columns)
        first += rows * columns
        found.append(
            rearrange(
                numbers,
                "(row y col x) -> (row col) (y x)",
                y=side,
                x=side,
                col=columns // side,
            )
        )
    return torch.cat(found) if found else torch.zeros(0, side**2, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Segments:
    """The sets of patches that attend to each other: whole images, or windows of them.

    Example:
        >>> Segments.of([(2, 6)], window=4, device=torch.device("cpu")).member
        tensor([0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1])
    """

    member: Int[Tensor, " patch"]
    """Which segment each patch belongs to."""
    by_size: tuple[Int[Tensor, "_segment _patch"], ...]
    """The patches of each segment, those of as many patches together."""

    @classmethod
    def of(cls, grids: Grids, window: int | None, device: torch.device) -> Segments:
        """Return the images themselves, or windows of `window` x `window` patches.

        Windows lie as tiles from the top left; those at the right and bottom may be smaller.
        """
        keys = places(grids)
        if window is None:
            keys[:, 1:] = 0
        else:
            keys[:, 1:] //= window
        _, member, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        sizes = defaultdict(list)
        for part in member.argsort(stable=True).split(counts.tolist()):
            sizes[len(part)].append(part)
        return cls(
            member.to(device), tuple(torch.stack(parts).to(device) for parts in sizes.values())
        )

    def to(self, device: torch.device) -> Segments:
        """Return the same on another device."""
        if device == self.member.device:
            return self
        return Segments(self.member.to(device), tuple(part.to(device) for part in self.by_size))

    @property
    def is_one(self) -> bool:
        """Whether every patch attends to all."""
        return len(self.by_size) == 1 and len(self.by_size[0]) == 1

    @cached_property
    def mask(self) -> Bool[Tensor, "1 1 query key"] | None:
        """True at what a query may attend to; None where that is everything."""
        return None if self.is_one else (self.member[:, None] == self.member)[None, None]


@dataclass(frozen=True, eq=False)
class SegmentedPast:
    """Nothing before: patches attend to their own image, in layers with windows to their window.

    Attention runs segment by segment, those of one size as one batch. Where something listens to
    scores or pattern, these have all pairs of patches, those of different segments masked.
    """

    images: Segments
    windows: Segments

    def kept(self, x: Tensor) -> Tensor:
        """Return `x`: every position has a query."""
        return x

    def attend(
        self, layer: int, q: Queries, k: Keys, v: Keys, rule: AttentionRule, weigh: Weigh | None
    ) -> Queries:
        """Return the heads' outputs of every query."""
        segments = (self.images if rule.window is None else self.windows).to(q.device)
        if weigh is not None:
            pattern = weigh(attention_scores(q, k, rule), segments.mask)
            if pattern is not None:
                return weighted_values(pattern, v).to(q.dtype)
        if segments.is_one:
            return attended(q, k, v, rule)
        z = torch.empty_like(q)
        for index in segments.by_size:
            own_q, own_k, own_v = (x[:, index].flatten(0, 1) for x in (q, k, v))
            z[:, index] = attended(own_q, own_k, own_v, rule).unflatten(0, (len(q), -1))
        return z
