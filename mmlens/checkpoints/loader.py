"""One streaming loader for all formats: tensor by tensor, to where they belong.

The model is built on the meta device, its parameters are allocated once on the target device, and
each tensor is read straight into its place. Nothing is handed out before everything has fitted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmlens.checkpoints.devices import DeviceMap, allocate
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.names import Slot, Table
from mmlens.checkpoints.weight_files import WeightFile, stream
from mmlens.config import MultimodalConfig
from mmlens.model import HookedMultimodalTransformer


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
    files: Sequence[WeightFile],
    table: Table,
    *,
    ignored: Sequence[str] = (),
    rename: Callable[[str], str] = str,
    dtype: torch.dtype,
    device: torch.device,
    device_map: DeviceMap | None = None,
    where: str = "the checkpoint",
) -> HookedMultimodalTransformer:
    """The model of a configuration, with the files' weights.

    Args:
        table: which tensor goes where; every one of its slots must be filled.
        ignored: regular expressions of tensors that the format leaves out on purpose.
        rename: brings a name to the form that `table` uses (older layouts of a format).
        where: what the weights are called in messages.

    Raises:
        CheckpointError: tensors that are unknown, missing or of another shape, all in one message
            and before anything is allocated; or a `device_map` that does not fit.
    """
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg).to(dtype)
    load_weights(
        model,
        files,
        table,
        ignored=ignored,
        rename=rename,
        device=device,
        device_map=device_map,
        where=where,
    )
    return model


def load_weights(
    model: nn.Module,
    files: Sequence[WeightFile],
    table: Table,
    *,
    ignored: Sequence[str] = (),
    rename: Callable[[str], str] = str,
    device: torch.device,
    device_map: DeviceMap | None = None,
    where: str = "the checkpoint",
) -> None:
    """Allocate a model that was built on the meta device, and fill it; see `build`."""
    tied = is_tied(dict(model.named_parameters(remove_duplicate=False)))
    shapes = {name: shape for file in files for name, shape in file.shapes().items()}
    check(model, shapes, table, ignored=ignored, rename=rename, where=where)
    allocate(model, device, device_map)
    if tied:  # each of the two has been allocated
        model.get_submodule("unembed").weight = model.get_parameter("embed.W_E")
    through = device if device_map is None else "cpu"
    tensors = stream(files, through, only=lambda name: rename(name) in table)
    fill(model, tensors, table, rename, total=len(table), where=where)


def check(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    table: Table,
    *,
    ignored: Sequence[str] = (),
    rename: Callable[[str], str] = str,
    where: str = "the checkpoint",
) -> None:
    """Raise one CheckpointError that lists every tensor that does not fit the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unfilled = dict(table)
    problems: list[str] = []
    for original, shape in shapes.items():
        name = rename(original)
        slot = table.get(name)
        if slot is None:
            if not any(re.fullmatch(pattern, name) for pattern in ignored):
                problems.append(f"  unknown tensor {original} {list(shape)}")
            continue
        unfilled.pop(name, None)
        expected = slot.of(parameters).shape
        if tuple(shape) != tuple(expected):
            problems.append(f"  {original} is {list(shape)}, the config makes it {list(expected)}")
    problems += [f"  missing tensor {name}" for name in unfilled]
    problems += [f"  nothing fills {name}" for name in unreachable(parameters, table)]
    if problems:
        listed = "\n".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{where} does not fit its configuration:\n{listed}{more}")


@torch.no_grad()
def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    table: Table,
    rename: Callable[[str], str] = str,
    *,
    total: int | None = None,
    where: str = "the checkpoint",
) -> None:
    """Copy every tensor that the table knows into its slot.

    Args:
        total: how many tensors there are, for the progress bar (which is shown to a person, and
            only where it takes longer than a moment).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bar = tqdm(tensors, f"loading {where}", total, leave=False, disable=None, delay=1.0)
    for original, tensor in bar:
        slot = table.get(rename(original))
        if slot is not None:
            slot.of(parameters).copy_(tensor)


def unreachable(parameters: dict[str, nn.Parameter], table: Table) -> list[str]:
    """Parameters (or parts of one) that no slot of the table covers."""
    covered = dict.fromkeys(parameters, 0)
    for slot in table.values():
        covered[slot.parameter] += rows(slot, len(parameters[slot.parameter]))
    if is_tied(parameters):
        covered["unembed.weight"] = covered["embed.W_E"]
    return [name for name, parameter in parameters.items() if covered[name] != len(parameter)]


def is_tied(parameters: dict[str, nn.Parameter]) -> bool:
    """Whether the unembedding is the embedding's own parameter."""
    head = parameters.get("unembed.weight")
    return head is not None and head is parameters["embed.W_E"]


def rows(slot: Slot, total: int) -> int:
    """How many rows of a parameter of `total` rows the slot covers."""
    return (total if slot.stop is None else slot.stop) - slot.start
