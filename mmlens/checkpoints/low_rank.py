"""A low-rank update of a checkpoint's matrices (LoRA), added to them while they are read.

The update of `X.weight` [out, in] is two factors, `X.lora_A` [rank, in] and `X.lora_B` [out, rank]:
W + alpha / rank * B @ A (Hu et al. 2021, "LoRA", section 4.1). They lie in a safetensors file with
`rank` and `alpha` in its metadata; what else is in it is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.weight_files import WeightFile, all_shapes, open_safetensors

FACTORS = r".*\.lora_[AB]"
"""What the factors are called."""


@dataclass(frozen=True)
class Update:
    """What is added to one matrix: `scale * B @ A`."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, matrix: Tensor) -> Tensor:
        """The sum, computed in float32 at least and rounded once, to the matrix's dtype."""
        a, b = (factor.float().to(matrix.device) for factor in (self.a, self.b))
        return (matrix + self.scale * (b @ a)).to(matrix.dtype)


@dataclass(frozen=True)
class UpdatedFile(WeightFile):
    """A file of weights, some of which are updated; `updates` has no prefix in its names."""

    updates: Mapping[str, Update] = field(default_factory=dict)

    def tensors(
        self, device: torch.device | str = "cpu", only: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Prefixed name and updated tensor, one at a time."""
        for name, tensor in super().tensors(device, only):
            update = self.updates.get(name.removeprefix(self.prefix))
            yield name, tensor if update is None else update.added_to(tensor)


def with_update(files: Sequence[WeightFile], path: Path) -> list[WeightFile]:
    """Return the files, with the low-rank update that is in `path`.

    Raises:
        CheckpointError: `path` is no such file, lacks a factor, or updates a tensor that the files
            do not have, or have in another shape.
    """
    updates = read_updates(path)
    shapes = dict(all_shapes(replace(file, prefix="") for file in files))
    for name, update in updates.items():
        if shapes.get(name) != update.shape:
            there = list(shapes[name]) if name in shapes else "not there"
            raise CheckpointError(
                f"{path} updates {name} as {list(update.shape)}; in the model it is {there}"
            )
    return [UpdatedFile(file.path, file.prefix, updates) for file in files]


def read_updates(path: Path) -> dict[str, Update]:
    """Return the updates in a file, by the names of the tensors that they belong to."""
    with open_safetensors(path) as stored:
        metadata = stored.metadata() or {}
    if not {"rank", "alpha"} <= metadata.keys():
        raise CheckpointError(
            f"{path}: rank and alpha must be in its metadata, which is {metadata}"
        )
    rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    factors = dict(WeightFile(path).tensors(only=lambda name: bool(re.fullmatch(FACTORS, name))))
    updates = {}
    for matrix in sorted({name.rpartition(".")[0] for name in factors}):
        a, b = (factors.get(f"{matrix}.lora_{factor}", torch.empty(0)) for factor in "AB")
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
            raise CheckpointError(
                f"{path} has {matrix}.lora_A {list(a.shape)} and lora_B {list(b.shape)}; of rank "
                f"{rank} they are [{rank}, in] and [out, {rank}]"
            )
        updates[f"{matrix}.weight"] = Update(a, b, alpha / rank)
    return updates
