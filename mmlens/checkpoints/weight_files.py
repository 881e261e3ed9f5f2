"""Weight files of a checkpoint, read tensor by tensor: safetensors, or `.bin` files of tensors."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmlens.checkpoints.errors import CheckpointError

# In the order in which transformers looks for them.
SINGLE = ("model.safetensors", "pytorch_model.bin")
PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class WeightFile:
    """A file of tensors, and what is put in front of their names."""

    path: Path
    prefix: str = ""

    @property
    def is_safetensors(self) -> bool:
        """Otherwise it is a pickle."""
        return self.path.suffix == ".safetensors"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Prefixed names of the file's tensors, with their shapes; no tensor is read."""
        if not self.is_safetensors:
            return {self.prefix + name: (*t.shape,) for name, t in load_pickle(self.path).items()}
        with open_safetensors(self.path) as tensors:
            return {
                self.prefix + name: tuple(tensors.get_slice(name).get_shape())
                for name in tensors.keys()  # noqa: SIM118 (not a dict)
            }

    def tensors(
        self, device: torch.device | str = "cpu", only: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Prefixed name and tensor, one at a time, of those whose prefixed name `only` accepts.

        Raises:
            CheckpointError: the file is truncated or holds something else.
        """
        if not self.is_safetensors:
            for name, tensor in load_pickle(self.path).items():
                if only is None or only(self.prefix + name):
                    yield self.prefix + name, tensor
            return
        with open_safetensors(self.path, device) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if only is None or only(self.prefix + name):
                    yield self.prefix + name, tensors.get_tensor(name)


def open_safetensors(path: Path, device: torch.device | str = "cpu") -> safe_open:
    """The open file.

    Raises:
        CheckpointError: it is truncated or of another kind.
    """
    try:
        return safe_open(path, framework="pt", device=str(device))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); download it again"
        ) from error


def load_pickle(path: Path) -> dict[str, Tensor]:
    """A `.bin` file's tensors, mapped from disk; nothing but tensors is ever unpickled.

    Raises:
        CheckpointError: it is truncated, or holds anything else.
    """
    try:
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError):  # written before torch 1.6: cannot be mapped, or is damaged
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "ends early"
        raise CheckpointError(
            f"{path} is truncated, or holds more than tensors ({reason}); download it again, or "
            "take the checkpoint's safetensors"
        ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    return tensors


def weight_files(folder: Path, prefix: str = "") -> list[WeightFile]:
    """The weight files of a checkpoint folder: one, or the shards that its index lists.

    Safetensors are taken where there are both kinds.

    Raises:
        CheckpointError: there are none, or a listed shard is missing.
    """
    for single in SINGLE:
        index = folder / f"{single}.index.json"
        if index.exists():
            return [WeightFile(path, prefix) for path in shards(index)]
        if (folder / single).exists():
            return [WeightFile(folder / single, prefix)]
    for pattern in PATTERNS:
        if found := sorted(folder.glob(pattern)):
            return [WeightFile(path, prefix) for path in found]
    raise CheckpointError(f"{folder} holds no weights: no *.safetensors and no pytorch_model*.bin")


def shards(index: Path) -> list[Path]:
    """The files that an index lists.

    Raises:
        CheckpointError: one is missing, or the index is none.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error})") from error
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} shards that {index.name} lists are "
            f"missing: {', '.join(missing)}"
        )
    return [index.parent / name for name in names]


def stream(
    files: Iterable[WeightFile],
    device: torch.device | str = "cpu",
    only: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, one at a time; see `WeightFile.tensors`."""
    for file in files:
        yield from file.tensors(device, only)


def has_tensor(folder: Path, pattern: str) -> bool:
    """Whether a tensor's name matches the whole regular expression; False without any weights."""
    try:
        files = weight_files(folder)
    except CheckpointError:  # told where the weights themselves are asked for
        return False
    return any(re.fullmatch(pattern, name) for file in files for name in file.shapes())
