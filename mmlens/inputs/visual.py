"""`Visual`: what a vision tower takes, packed over the images of a batch.

    inputs.visual["pixel_values"]      # [tile, channel, height, width] of all images; of towers
                                       # that take any grid (Qwen-VL) [patch, pixel]
    inputs.visual.of([2])              # those of the third image alone

Nobody but the tower and the connector looks into the tensors; everybody else chooses images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Visual"]


@dataclass(frozen=True, eq=False)
class Visual(Mapping[str, Tensor]):
    """Tensors by transformers' names, packed along their first axis over images in reading order.

    Example:
        >>> Visual({"pixel_values": pixels}, {"pixel_values": (5, 3)})  # 5 and 3 tiles
    """

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, tuple[int, ...]]
    """How many rows of each tensor belong to each image."""

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            counts = self.counts[name]
            if sum(counts) != len(tensor) or len(counts) != self.n_images:
                raise ValueError(
                    f"{name} has {len(tensor)} rows, which do not belong to {self.n_images} images "
                    f"of {list(counts)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @classmethod
    def of_one(cls, tensors: Mapping[str, Tensor]) -> Visual:
        """Return what belongs to one image."""
        return cls(dict(tensors), {name: (len(tensor),) for name, tensor in tensors.items()})

    @property
    def axis(self) -> int:
        """The axis along which what is made of `pixel_values` counts their rows.

        Tiles [channel, height, width] are rows of a batch; patches [pixel] of images of any grid
        lie in one row, one after the other.
        """
        return 0 if self["pixel_values"].ndim > 2 else 1

    @property
    def n_images(self) -> int:
        """How many images there are."""
        return len(next(iter(self.counts.values()), ()))

    def rows_of(self, name: str, images: Sequence[int]) -> list[int]:
        """Return which rows of a tensor belong to these images, in their order."""
        slices = [self._slices(image)[name] for image in images]
        return [row for part in slices for row in range(part.start, part.stop)]

    def of(self, images: Sequence[int]) -> Visual:
        """Return what belongs to these images, in this order."""
        parts = [self._slices(image) for image in images]
        return Visual(
            {
                name: torch.cat([tensor[part[name]] for part in parts]) if parts else tensor[:0]
                for name, tensor in self.tensors.items()
            },
            {name: tuple(counts[i] for i in images) for name, counts in self.counts.items()},
        )

    def _slices(self, image: int) -> dict[str, slice]:
        return {
            name: slice(sum(counts[:image]), sum(counts[: image + 1]))
            for name, counts in self.counts.items()
        }

    @classmethod
    def joined(cls, parts: Sequence[Visual]) -> Visual | None:
        """Return several as one; None where there are none.

        Raises:
            ValueError: pixels of other shapes, or of other models.
        """
        if not parts:
            return None
        names = list(parts[0])
        for name in names:
            shapes = [tuple(part.tensors[name].shape[1:]) for part in parts if name in part.tensors]
            if len(shapes) < len(parts) or len(set(shapes)) > 1:
                raise ValueError(
                    f"inputs of one batch must share their image shape; those of {name} are "
                    f"{shapes}"
                )
        return cls(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in names},
            {name: sum((part.counts[name] for part in parts), ()) for name in names},
        )

    def same(self, image: int, other: Visual, other_image: int) -> bool:
        """Return whether an image is the same as one of another `Visual`."""
        mine, theirs = self._slices(image), other._slices(other_image)
        return mine.keys() == theirs.keys() and all(
            torch.equal(self.tensors[name][mine[name]], other.tensors[name][theirs[name]])
            for name in mine
        )

    def repeated(self, times: int) -> Visual:
        """Return all images several times, one round after the other."""
        return Visual(
            {
                name: tensor.repeat(times, *(1,) * (tensor.ndim - 1))
                for name, tensor in self.tensors.items()
            },
            {name: counts * times for name, counts in self.counts.items()},
        )

    def to(self, device: torch.device | str | int) -> Visual:
        """Return the same on another device."""
        return Visual({name: t.to(device) for name, t in self.tensors.items()}, self.counts)

    def replaced(self, **tensors: Tensor) -> Visual:
        """Return the same images with other tensors, of as many rows."""
        return Visual({**self.tensors, **tensors}, self.counts)
