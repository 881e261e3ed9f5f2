"""`Schedule`: which branches a pass computes in which layer, and at which positions.

It is made of numbers alone, before anything runs (`mmlens.branching.joined` carries it out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmlens.branching.packing import Packing


@dataclass(frozen=True)
class Start:
    """Where a branch begins to differ."""

    layer: int
    """The layer at which it joins: `n_layers` for the final norm, -1 where it changes what enters
    the first layer."""
    first: int
    """The first position that can differ."""
    tail: int
    """The first position that is needed after the last layer's keys and values."""


@dataclass(frozen=True)
class Step:
    """Layers that compute the same branches at the same positions."""

    joining: range
    """The branches that enter before these layers, after those that are there already."""
    layers: range
    """Empty in the last step, where the branches enter that change the final norm alone."""
    keys: Packing
    """The positions at which each branch has keys and values."""
    queries: Packing
    """The positions that go on to the next step; fewer than `keys` in the last layer."""


@dataclass(frozen=True)
class Schedule:
    """What one pass computes.

    Example:
        >>> schedule = Schedule.of([Start(0, 2, 3), Start(1, 3, 3)], [3], n_layers=2, n_pos=4)
        >>> [(step.layers, step.keys.starts, step.queries.starts) for step in schedule.steps]
        [(range(0, 1), (2,), (2,)), (range(1, 2), (2, 3), (3, 3)), (range(2, 2), (3, 3), (3, 3))]
    """

    firsts: Packing
    """Of all branches in all layers but the last."""
    tails: Packing
    """Of all branches after the last layer's keys and values."""
    steps: tuple[Step, ...]
    read: tuple[int, ...]
    """The entries of `tails` that are read, branch by branch."""

    @classmethod
    def of(
        cls, starts: Sequence[Start], read: Sequence[int], n_layers: int, n_pos: int
    ) -> Schedule:
        """Plan a pass over branches, given in the order of their layers, each read at `read`."""
        firsts, tails = (start.first for start in starts), (start.tail for start in starts)
        packed, kept = Packing(tuple(firsts), n_pos), Packing(tuple(tails), n_pos)
        begins = [max(start.layer, 0) for start in starts]
        cuts = sorted({*begins, max(n_layers - 1, begins[0]), n_layers})
        steps, n_before = [], 0
        for begin, end in pairwise([*cuts, n_layers]):
            n = sum(layer <= begin for layer in begins)
            early, late = (Packing(each.starts[:n], n_pos) for each in (packed, kept))
            keys = early if begin < n_layers else late
            queries = early if begin < n_layers - 1 else late
            steps.append(Step(range(n_before, n), range(begin, end), keys, queries))
            n_before = n
        entries = [end - n_pos + position for end in kept.offsets[1:] for position in read]
        return cls(packed, kept, tuple(steps), tuple(entries))
