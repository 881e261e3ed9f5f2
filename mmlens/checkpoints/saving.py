"""A model written in the format that it came from, so that an edited one can be used elsewhere.

The checkpoint that it was loaded from says what is written: the same tensors under the same names
in the same shards, ours where the format's table has a place for them, and the rest (the tower's
last blocks, say) as it is there. Tokenizer, processors and whatever else lies there come along, as
far as it is a regular file: a link out of the folder would copy what the checkpoint never held.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.hf_configs import GENERATION_CONFIG, generation_config
from mmlens.checkpoints.json_files import check_folder, read_json
from mmlens.checkpoints.load import format_of
from mmlens.checkpoints.paths import is_inside
from mmlens.checkpoints.weight_files import WeightFile, all_shapes, weight_files
from mmlens.model.hooked_root_module import exclusively
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.utils.files import new_folder
from mmlens.utils.grad_mode import without_gradients

# Weights, which are written anew, and what training leaves beside them; and hidden files.
NOT_COPIED = (
    "*.safetensors *.bin *.pt *.pth *.ckpt *.gguf *.h5 *.msgpack *.onnx *.index.json .*".split()
)
SINGLE, TOWER = "model.safetensors", "vision_tower.safetensors"


@exclusively
def save_model(model: HookedMultimodalTransformer, target: Path) -> Path:
    """Write the model to a new folder; it appears there when everything is written.

    Pickles (`.bin`) become safetensors. A vision tower that came from a checkpoint of its own is
    written as well, under the names that the format has for one. Memory: one shard at a time.

    Raises:
        CheckpointError: it came from no checkpoint folder, or that folder has changed.
        FileExistsError: there is something at `target`, or a link.
        OSError: it cannot be written, because the disk is full, say; nothing is left after.

    Example:
        >>> model = HookedMultimodalTransformer.from_pretrained("llava-hf/llava-1.5-7b-hf")
        >>> with torch.no_grad():
        ...     model.blocks[3].mlp.W_out.mul_(2)
        >>> model.save_pretrained("edited")
        >>> LlavaForConditionalGeneration.from_pretrained("edited")
    """
    source = model.checkpoint
    if source is None:
        raise CheckpointError(
            f"this model ({model.cfg.model_name or 'built from a config'}) came from no checkpoint "
            "folder whose format it could be written in; keep its weights with "
            "safetensors.torch.save_model(model, path)"
        )
    if not source.is_dir():
        raise CheckpointError(
            f"{source}, where this model came from, is gone: its names, shards and tokenizer are "
            "needed to write the model"
        )
    if target.is_symlink():
        raise FileExistsError(f"{target} is a link to {target.readlink()}: choose another folder")
    check_folder(source)
    format, files = format_of(source), weight_files(source)
    with new_folder(target) as scratch:
        shutil.copytree(source, scratch, ignore=not_copied(source), dirs_exist_ok=True)
        set_dtype(scratch / "config.json", model.cfg.dtype)
        if model.generation_config != generation_config(source, model.cfg.pad_token_id):
            write_generation_config(model, scratch / GENERATION_CONFIG)
        written: dict[str, str] = {}
        size = 0
        for name, tensors in written_shards(model, format, files):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, scratch / name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if set(written.values()) != {SINGLE}:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(written.items()))}
            (scratch / f"{SINGLE}.index.json").write_text(json.dumps(index, indent=2))
    return target


def not_copied(source: Path) -> Callable[[str, list[str]], set[str]]:
    """Return what `shutil.copytree` asks: which names of a folder are left out.

    These are weights, hidden files, folders that are links, and all but regular files of `source`.
    """
    by_name = shutil.ignore_patterns(*NOT_COPIED)

    def left_out(folder: str, names: list[str]) -> set[str]:
        found = set(by_name(folder, names))
        for name in set(names) - found:
            path = Path(folder, name)
            is_folder = path.is_dir() and not path.is_symlink()
            if not is_folder and not (path.is_file() and is_inside(path, source)):
                warnings.warn(f"{path} is not copied: it is no file of its folder", stacklevel=2)
                found.add(name)
        return found

    return left_out


def shard_names(files: Sequence[WeightFile], source: Path, more: bool) -> list[str]:
    """Return what the files are called where they are written: as in `source`, as safetensors.

    Args:
        more: whether another file is written beside them.
    """
    names = []
    for file in files:
        inside = file.path.relative_to(source)
        stem = inside.stem.replace("pytorch_model", "model")
        names.append(inside.with_name(f"{stem}.safetensors").as_posix())
    if len({name.casefold() for name in names}) < len(names):
        raise CheckpointError(
            f"{source} has files of weights that would have one name: "
            f"{', '.join(sorted(str(file.path.relative_to(source)) for file in files))}"
        )
    if SINGLE in names and len(names) + more > 1:
        # Whoever finds a file of that name takes it for the whole, and looks at no index.
        names[names.index(SINGLE)] = f"model-00001-of-{len(names) + more:05}.safetensors"
    return names


@without_gradients
def written_shards(
    model: HookedMultimodalTransformer, format: Format, files: list[WeightFile]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield file names with their tensors, on the CPU; one file at a time."""
    assert model.checkpoint is not None
    held = {format.rename(name) for name, _ in all_shapes(files)}
    elsewhere = {name: slot for name, slot in format.table(model.cfg).items() if name not in held}
    names = shard_names(files, model.checkpoint, more=bool(elsewhere))
    # A copy of tied embeddings may be in the checkpoint; the edit must reach it.
    table = format.table(replace(model.cfg, tie_word_embeddings=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, file in zip(names, files, strict=True):
        ours: dict[str, Tensor] = {}
        for name, shape in file.shapes().items():
            if (slot := table.get(format.rename(name))) is None:
                continue
            ours[name] = slot.of(parameters).cpu().contiguous()
            if ours[name].shape != shape:
                raise CheckpointError(
                    f"{file.path} has {name} {list(shape)}, this model {list(ours[name].shape)}: "
                    "it is no longer the checkpoint that the model came from"
                )
            if model.cfg.tie_word_embeddings and slot.parameter == "unembed.weight":
                ours[name] = ours[name].clone()  # safetensors has no two names for one place
        left = file.shapes().keys() - ours.keys()
        kept = {name: tensor.contiguous() for name, tensor in file.tensors(only=left.__contains__)}
        yield target, ours | kept
    if elsewhere:
        tower = {name: slot.of(parameters).cpu() for name, slot in elsewhere.items()}
        yield TOWER, tower


def write_generation_config(model: HookedMultimodalTransformer, path: Path) -> None:
    """Write the model's settings of generation, and its end tokens, as transformers writes them."""
    config = copy.deepcopy(model.generation_config)
    if config.eos_token_id is None:
        config.eos_token_id = list(model.cfg.eos_token_ids) or None
    config.to_json_file(path)


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let a config.json say this dtype, wherever it says one, and name no file of weights."""
    config = read_json(path)
    config.pop("transformers_weights", None)
    name = str(dtype).removeprefix("torch.")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = name
    path.write_text(json.dumps(config, indent=2) + "\n")
