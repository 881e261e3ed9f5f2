"""One streaming loader for all formats: safetensors, tensor by tensor, to where they belong.

The model is built on the meta device, its parameters are allocated once on the target device, and
each tensor is read straight into its place. Nothing is handed out before everything has fitted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.names import Slot, Table
from mmlens.config import MultimodalConfig
from mmlens.model import HookedMultimodalTransformer


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file, and what is put in front of its tensors' names."""

    path: Path
    prefix: str = ""


def safetensors_of(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder: one, or the shards that its index lists.

    Raises:
        CheckpointError: there are none, or a listed shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(names)} shards that {index.name} lists are "
                f"missing: {', '.join(missing)}"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no *.safetensors; convert its weights to safetensors first"
        )
    return files


def stream(
    files: Iterable[WeightFile],
    device: torch.device,
    only: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files (whose name `only` accepts) with its prefixed name, one at a time.

    Raises:
        CheckpointError: a file is truncated or no safetensors file.
    """
    for file in files:
        try:
            with safe_open(file.path, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if only(file.prefix + name):
                        yield file.prefix + name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file.path} is truncated or not a safetensors file ({error}); download it again"
            ) from error


def has_own_head(files: Sequence[WeightFile], rename: Callable[[str], str], table: Table) -> bool:
    """Whether the files hold an unembedding that differs from the embedding.

    Where config.json ties the two nevertheless, transformers believes the files, and so do we.

    Args:
        table: the format's for a model that is not tied.
    """
    ends = {
        name for name, slot in table.items() if slot.parameter in ("embed.W_E", "unembed.weight")
    }
    found = [t for _, t in stream(files, torch.device("cpu"), lambda name: rename(name) in ends)]
    return len(found) == 2 and not torch.equal(*found)


def build(
    cfg: MultimodalConfig, dtype: torch.dtype, device: torch.device
) -> HookedMultimodalTransformer:
    """A model with allocated, not yet filled parameters."""
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg)
    model = model.to(dtype).to_empty(device=device)
    if cfg.tie_word_embeddings:
        model.unembed.weight = model.embed.W_E
    return model


@torch.no_grad()
def fill(
    model: HookedMultimodalTransformer,
    tensors: Iterable[tuple[str, Tensor]],
    table: Table,
    *,
    ignored: Sequence[str] = (),
    rename: Callable[[str], str] = str,
    where: str = "the checkpoint",
) -> None:
    """Copy every tensor into its slot.

    Args:
        table: which tensor goes where; every one of its slots must be filled.
        ignored: regular expressions of tensors that the format leaves out on purpose.
        rename: brings a name to the form that `table` uses (older layouts of a format).

    Raises:
        CheckpointError: tensors that are unknown, missing or of another shape, all in one message.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unfilled = dict(table)
    problems: list[str] = []
    for original, tensor in tensors:
        name = rename(original)
        slot = table.get(name)
        if slot is None:
            if not any(re.fullmatch(pattern, name) for pattern in ignored):
                problems.append(f"  unknown tensor {original} {list(tensor.shape)}")
            continue
        unfilled.pop(name, None)
        place = parameters[slot.parameter][slot.start : slot.stop]
        if tensor.shape != place.shape:
            problems.append(
                f"  {original} is {list(tensor.shape)}, the config makes it {list(place.shape)}"
            )
            continue
        place.copy_(tensor)
    problems += [f"  missing tensor {name}" for name in unfilled]
    problems += [f"  nothing fills {name}" for name in unreachable(parameters, table, model)]
    if problems:
        shown = "\n".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{where} does not fit its config.json:\n{shown}{more}")


def unreachable(
    parameters: dict[str, torch.nn.Parameter], table: Table, model: HookedMultimodalTransformer
) -> list[str]:
    """Parameters (or parts of one) that no slot of the table covers."""
    covered = dict.fromkeys(parameters, 0)
    for slot in table.values():
        covered[slot.parameter] += rows(slot, len(parameters[slot.parameter]))
    if model.cfg.tie_word_embeddings:
        covered["unembed.weight"] = covered["embed.W_E"]
    return [name for name, parameter in parameters.items() if covered[name] != len(parameter)]


def rows(slot: Slot, total: int) -> int:
    """How many rows of a parameter of `total` rows the slot covers."""
    return (total if slot.stop is None else slot.stop) - slot.start
