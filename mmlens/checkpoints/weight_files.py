"""Weight files of a checkpoint, read tensor by tensor: safetensors, or `.bin` files of tensors."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.json_files import read_json
from mmlens.checkpoints.paths import checkpoint_errors, leaves_its_folder, reason, regular_file

SETS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them (`_get_resolved_checkpoint_files`)."""
PATTERNS = ("*.safetensors", "pytorch_model*.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


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
        """Return prefixed names of the file's tensors, with their shapes; no tensor is read."""
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
        """Yield prefixed name and tensor, one at a time, where `only` takes the prefixed name."""
        if not self.is_safetensors:
            for name, tensor in load_pickle(self.path).items():
                if only is None or only(self.prefix + name):
                    yield self.prefix + name, tensor
            return
        with open_safetensors(self.path, device) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if only is None or only(self.prefix + name):
                    # There are kinds of numbers that torch has not.
                    with checkpoint_errors(f"{self.path}: {name}"):
                        tensor = tensors.get_tensor(name)
                    yield self.prefix + name, tensor


def open_safetensors(path: Path, device: torch.device | str = "cpu") -> safe_open:
    """Return the open file; one that is truncated, or of another kind, is refused."""
    regular_file(path)
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({reason(error)}); download it again"
        ) from error


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return a `.bin` file's tensors, mapped from disk; nothing but tensors is ever unpickled."""
    if zipfile.is_zipfile(regular_file(path)):
        with checkpoint_errors(path), zipfile.ZipFile(path) as archive:
            # torch compresses nothing but programs. A megabyte could become a gigabyte.
            stored = [entry for entry in archive.infolist() if "/code/" not in entry.filename]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in stored):
                raise CheckpointError(f"{path} is compressed, as no file of torch's tensors is")
    try:
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError):  # written before torch 1.6: cannot be mapped, or is damaged
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged file leads it to
        raise CheckpointError(
            f"{path} is truncated, or holds more than tensors ({reason(error)}); download it "
            "again, or take the checkpoint's safetensors"
        ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not tensors or not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds no dictionary of tensors")
        if not is_stored(tensor):
            raise CheckpointError(f"{path}: {name} is not stored entry by entry")
    return tensors


def is_stored(tensor: Tensor) -> bool:
    """Whether the file holds every entry; it may be sparse, or one entry shown a million times."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes()


def weight_files(folder: Path, prefix: str = "") -> list[WeightFile]:
    """Return the weight files of a checkpoint folder: one, or the shards that an index lists.

    Of several sets of weights the first of `SETS` is taken, as transformers does; or the one that
    config.json names (`transformers_weights`).

    Raises:
        CheckpointError: there are none, a listed shard is missing, or one lies outside of the
            folder or is no regular file.
    """
    for name in weight_sets(folder):
        return [WeightFile(path, prefix) for path in files_of(folder / name, folder)]
    for pattern in PATTERNS:
        if found := sorted(folder.glob(pattern)):
            return [WeightFile(regular_file(path, folder), prefix) for path in found]
    raise CheckpointError(f"{folder} holds no weights: no *.safetensors and no pytorch_model*.bin")


def weight_sets(folder: Path) -> list[str]:
    """Return the names of a folder's sets of weights, files or indices, in the order of `SETS`."""
    config = folder / "config.json"
    named = read_json(config, folder).get("transformers_weights") if config.exists() else None
    names = [named, *SETS] if isinstance(named, str) and not leaves_its_folder(named) else SETS
    return [name for name in dict.fromkeys(names) if os.path.lexists(folder / name)]


def files_of(path: Path, folder: Path) -> list[Path]:
    """Return the files of one set of weights, by the path of the file itself or of an index."""
    return shards(path) if path.suffix == ".json" else [regular_file(path, folder)]


def shards(index: Path) -> list[Path]:
    """Return the files that an index lists, all of them weights inside of its folder."""
    folder = index.parent
    listed = read_json(index, folder).get("weight_map")
    named = list(listed.values()) if isinstance(listed, dict) else []
    if not named or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{index} is no index of shards: it has no weight_map of file names")
    names = sorted(set(named))
    for name in names:
        if leaves_its_folder(name) or not name.endswith(SUFFIXES):
            raise CheckpointError(
                f"{index} lists {name!r}; it must be a file of weights ({', '.join(SUFFIXES)}) "
                "inside of the folder"
            )
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(names)} shards that {index.name} lists are "
            f"missing: {', '.join(missing)}"
        )
    return [regular_file(folder / name, folder) for name in names]


def warn_of_another_set(folder: Path) -> None:
    """Warn where a folder holds two sets of weights that differ, and say which one is taken."""
    taken, *others = weight_sets(folder) or [""]
    for other in others:
        try:
            differ = are_different(*(files_of(folder / name, folder) for name in (taken, other)))
        except CheckpointError:  # shards that are gone, say: nobody will take that set
            continue
        if differ:
            warnings.warn(
                f"{folder} holds two sets of weights that differ: {taken} is taken, as "
                f"transformers does, and {other} is not",
                stacklevel=4,
            )


def are_different(some: Sequence[Path], others: Sequence[Path]) -> bool:
    """Whether two sets of weights differ in a name, a shape, a dtype or an entry.

    Everything that is compared is mapped from disk. Pickles from before torch 1.6, which cannot be,
    count as different.
    """
    if not all(file.suffix == ".safetensors" or zipfile.is_zipfile(file) for file in others):
        return True
    theirs = dict(stream(map(WeightFile, others)))
    for name, mine in stream(map(WeightFile, some)):
        other = theirs.pop(name, None)
        if other is None or (mine.dtype, mine.shape) != (other.dtype, other.shape):
            return True
        if not torch.equal(mine, other):
            return True
    return bool(theirs)


def stream(
    files: Iterable[WeightFile],
    device: torch.device | str = "cpu",
    only: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the files, one at a time; see `WeightFile.tensors`."""
    for file in files:
        yield from file.tensors(device, only)


def all_shapes(files: Iterable[WeightFile]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of the files; see `WeightFile.shapes`."""
    for file in files:
        yield from file.shapes().items()


def has_tensor(folder: Path, pattern: str) -> bool:
    """Whether a tensor's name matches the whole regular expression; False without any weights."""
    try:
        files = weight_files(folder)
    except CheckpointError:  # told where the weights themselves are asked for
        return False
    return any(re.fullmatch(pattern, name) for name, _ in all_shapes(files))
