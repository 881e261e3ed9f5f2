"""One streaming loader for all formats: tensor by tensor, to where they belong.

The model is built on the meta device, its parameters are allocated once on the target device, and
each tensor is read straight into its place. Nothing is handed out before everything has fitted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from mmlens.checkpoints.devices import DeviceMap, allocate
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.names import Table
from mmlens.checkpoints.paths import checkpoint_errors
from mmlens.checkpoints.weight_files import WeightFile, all_shapes, stream
from mmlens.config import MultimodalConfig
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.printable import printable


@dataclass(frozen=True)
class Weights:
    """Weight files, and where their tensors go."""

    files: Sequence[WeightFile]
    table: Table
    """Which tensor goes where; every one of its slots must be filled."""
    ignored: Sequence[str] = ()
    """Regular expressions of tensors that the format leaves out on purpose."""
    rename: Callable[[str], str] = str
    """Brings a name to the form that `table` uses (older layouts of a format)."""


def has_own_head(files: Sequence[WeightFile], rename: Callable[[str], str], table: Table) -> bool:
    """Whether the files hold an unembedding that differs from the embedding.

    Where config.json ties the two nevertheless, transformers believes the files, and so do we.

    Args:
        table: the format's for a model that is not tied.
    """
    ends = {
        name for name, slot in table.items() if slot.parameter in ("embed.W_E", "unembed.weight")
    }
    found = [t for _, t in stream(files, only=lambda name: rename(name) in ends)]
    return len(found) == 2 and not torch.equal(*found)


def build(
    cfg: MultimodalConfig,
    weights: Weights,
    *,
    dtype: torch.dtype,
    device: torch.device,
    device_map: DeviceMap | None = None,
    where: str = "the checkpoint",
) -> HookedMultimodalTransformer:
    """Return the model of a configuration, with these weights; see `load_weights`."""
    with torch.device("meta"), checkpoint_errors(Path(where, "config.json")):
        model = HookedMultimodalTransformer(cfg).to(dtype)
    load_weights(model, weights, device=device, device_map=device_map, where=where)
    return model


def load_weights(
    model: nn.Module,
    weights: Weights,
    *,
    device: torch.device,
    device_map: DeviceMap | None = None,
    where: str = "the checkpoint",
) -> None:
    """Allocate a model that was built on the meta device, and fill it.

    Args:
        where: what the weights are called in messages.

    Raises:
        CheckpointError: tensors that are unknown, missing or of another shape, all in one message
            and before anything is allocated; or a `device_map` that does not fit.
    """
    tied = is_tied(dict(model.named_parameters(remove_duplicate=False)))
    check(model, dict(all_shapes(weights.files)), weights, where)
    allocate(model, device, device_map)
    if tied:  # each of the two has been allocated
        model.get_submodule("unembed").weight = model.get_parameter("embed.W_E")
    fill(model, weights, device if device_map is None else "cpu", where)


def check_layers(cfg: MultimodalConfig, files: Sequence[WeightFile], where: object) -> None:
    """Raise a CheckpointError where a configuration has more layers than the files have tensors.

    Layers cost memory before any shape is compared, even on the meta device.
    """
    n_tensors = sum(len(file.shapes()) for file in files)
    parts = {"decoder": cfg, "vision tower": cfg.vision, "projector": cfg.projector}
    for name, part in parts.items():
        if part is not None and part.n_layers > n_tensors:
            raise CheckpointError(
                f"{where}: its config.json says that the {name} has {part.n_layers:,} layers, but "
                f"its files hold {n_tensors:,} tensors in all"
            )


def check(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    weights: Weights,
    where: str = "the checkpoint",
) -> None:
    """Raise one CheckpointError that lists every tensor that does not fit the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unfilled = dict(weights.table)
    problems: list[str] = []
    for original, shape in shapes.items():
        name = weights.rename(original)
        slot = weights.table.get(name)
        if slot is None:
            if not any(re.fullmatch(pattern, name) for pattern in weights.ignored):
                problems.append(f"  unknown tensor {original} {list(shape)}")
            continue
        unfilled.pop(name, None)
        expected = slot.of(parameters).shape
        if tuple(shape) != tuple(expected):
            problems.append(f"  {original} is {list(shape)}, the config makes it {list(expected)}")
    problems += [f"  missing tensor {name}" for name in unfilled]
    problems += [f"  nothing fills {name}" for name in unreachable(parameters, weights.table)]
    if problems:
        listed = "\n".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{where} does not fit its configuration:\n{listed}{more}")


@without_gradients
def fill(model: nn.Module, weights: Weights, through: torch.device | str, where: str) -> None:
    """Copy every tensor that the table knows into its slot, through a device.

    A progress bar is shown to a person, where it takes longer than a moment.
    """
    table, rename = weights.table, weights.rename
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = stream(weights.files, through, only=lambda name: rename(name) in table)
    bar = tqdm(
        tensors, printable(f"loading {where}"), len(table), leave=False, disable=None, delay=1.0
    )
    for original, tensor in bar:
        slot = table.get(rename(original))
        if slot is None:
            continue
        if not tensor.is_floating_point():  # of a quantised model, say
            raise CheckpointError(
                f"{where}: {original} is {tensor.dtype}; weights must be floating point numbers"
            )
        slot.fill(parameters, tensor)


def unreachable(parameters: dict[str, nn.Parameter], table: Table) -> list[str]:
    """Parameters (or parts of one) that no slot of the table covers."""
    covered = dict.fromkeys(parameters, 0)
    for slot in table.values():
        covered[slot.parameter] += len(parameters[slot.parameter][slot.start : slot.stop])
    if is_tied(parameters):
        covered["unembed.weight"] = covered["embed.W_E"]
    return [name for name, parameter in parameters.items() if covered[name] != len(parameter)]


def is_tied(parameters: dict[str, nn.Parameter]) -> bool:
    """Whether the unembedding is the embedding's own parameter."""
    head = parameters.get("unembed.weight")
    return head is not None and head is parameters["embed.W_E"]
