"""`Packing`: where the positions of several runs lie that are one after the other in one row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.utils.tensors import to_device


class OnEachDevice(dict[torch.device, Tensor]):
    """A tensor that was made in main memory, and is moved to each device once."""

    def __init__(self, made: Tensor) -> None:
        super().__init__()
        self.made = made

    def __missing__(self, device: torch.device) -> Tensor:
        self[device] = to_device(self.made, device)
        return self[device]


@dataclass(frozen=True)
class Packing:
    """Where continuations lie that are packed one after the other.

    Continuation `i` holds the positions `starts[i] ... n_pos - 1`, at
    `offsets[i] ... offsets[i + 1] - 1` of the packed axis.

    Example:
        >>> Packing((2, 3), n_pos=5).positions[torch.device("cpu")]
        tensor([2, 3, 4, 3, 4])
    """

    starts: tuple[int, ...]
    n_pos: int

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each begins in the packed axis, and where the last one ends."""
        return (0, *accumulate(self.n_pos - start for start in self.starts))

    @cached_property
    def first(self) -> int:
        """The first position that any of them holds."""
        return min(self.starts)

    @cached_property
    def is_rectangle(self) -> bool:
        """Whether all hold the same positions."""
        return self.first == max(self.starts)

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts and offsets as columns, the positions from the first on as a row."""
        columns = torch.tensor([self.starts, self.offsets[:-1]])[:, :, None]
        return columns[0], columns[1], torch.arange(self.first, self.n_pos)[None]

    @cached_property
    def positions(self) -> OnEachDevice:
        """The position of every packed entry."""
        starts, _, position = self._grid
        inside = position >= starts
        return OnEachDevice(position.expand_as(inside)[inside])

    @cached_property
    def _to_rectangle(self) -> OnEachDevice:
        starts, offsets, position = self._grid
        return OnEachDevice(offsets + (position - starts).clamp(min=0))

    @cached_property
    def _from_rectangle(self) -> OnEachDevice:
        starts, _, position = self._grid
        return OnEachDevice((position >= starts).flatten().nonzero()[:, 0])

    def entries_of(self, later: Packing) -> Int[Tensor, " kept"]:
        """Return which entries are those of a packing whose continuations begin later."""
        starts, _, position = self._grid
        wanted = position >= torch.tensor(later.starts)[:, None]
        return wanted[position >= starts].nonzero()[:, 0]

    def filling(self, origin: int, n_base: int) -> Int[Tensor, "continuation own"]:
        """Return where the positions from `origin` on lie, a row for each continuation.

        Those before its start lie in `n_base` entries of a run, from `origin` on; the others after.
        """
        starts, offsets, _ = self._grid
        position = torch.arange(origin, self.n_pos)[None]
        own = n_base + offsets + position - starts
        return torch.where(position < starts, position - origin, own)

    def rectangle(
        self, packed: Float[Tensor, "row packed *shape"]
    ) -> Float[Tensor, "row continuation wide *shape"]:
        """Return a row for each continuation, from `first` on; before its start it is filler."""
        if self.is_rectangle:
            return packed.unflatten(1, (len(self.starts), -1))
        return packed[:, self._to_rectangle[packed.device]]

    def flat(
        self, rectangle: Float[Tensor, "row continuation wide *shape"]
    ) -> Float[Tensor, "row packed *shape"]:
        """Return the inverse of `rectangle`."""
        packed = rectangle.flatten(1, 2)
        return packed if self.is_rectangle else packed[:, self._from_rectangle[packed.device]]
