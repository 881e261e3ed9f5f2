"""A model written in the format that it came from, so that an edited one can be used elsewhere.

The checkpoint that it was loaded from says what is written: the same tensors under the same names
in the same shards, ours where the format's table has a place for them, and the rest (the tower's
last blocks, say) as it is there. Tokenizer, processors and whatever else lies there come along.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmlens.checkpoints import CheckpointFormat, format_of
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.weight_files import WeightFile, weight_files
from mmlens.files import new_folder
from mmlens.model import HookedMultimodalTransformer

# Weights, which are written anew, and what training leaves beside them; and hidden files.
NOT_COPIED = (
    "*.safetensors *.bin *.pt *.pth *.ckpt *.gguf *.h5 *.msgpack *.onnx *.index.json .*".split()
)
SINGLE = "model.safetensors"


def save_model(model: HookedMultimodalTransformer, target: Path) -> Path:
    """Write the model to a new folder; it appears there when everything is written.

    Pickles (`.bin`) become safetensors. A vision tower that came from a checkpoint of its own is
    written as well, under the names that the format has for one. Memory: one shard at a time.

    Raises:
        CheckpointError: it came from no checkpoint folder, or that folder has changed.
        FileExistsError: there is something at `target`.

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
    format, files = format_of(source), weight_files(source)
    with new_folder(target) as scratch:
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(source, scratch, ignore=ignored, dirs_exist_ok=True)
        set_dtype(scratch / "config.json", model.cfg.dtype)
        written: dict[str, str] = {}
        size = 0
        for name, tensors in shards(model, format, files):
            save_file(tensors, scratch / name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if set(written.values()) != {SINGLE}:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(written.items()))}
            (scratch / f"{SINGLE}.index.json").write_text(json.dumps(index, indent=2))
    return target


@torch.no_grad()
def shards(
    model: HookedMultimodalTransformer, format: CheckpointFormat, files: list[WeightFile]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File names with their tensors, on the CPU; one file at a time.

    Raises:
        CheckpointError: a shape that is not the model's: the checkpoint has been exchanged.
    """
    # A copy of tied embeddings may be in the checkpoint; the edit must reach it.
    table = format.table(replace(model.cfg, tie_word_embeddings=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    elsewhere = format.table(model.cfg)
    for file in files:
        ours: dict[str, Tensor] = {}
        for name, shape in file.shapes().items():
            elsewhere.pop(format.rename(name), None)
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
        yield f"{file.path.stem.replace('pytorch_model', 'model')}.safetensors", ours | kept
    if elsewhere:
        tower = {name: slot.of(parameters).cpu() for name, slot in elsewhere.items()}
        yield "vision_tower.safetensors", tower


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let a config.json say this dtype, wherever it says one."""
    config: dict[str, Any] = json.loads(path.read_text())
    name = str(dtype).removeprefix("torch.")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = name
    path.write_text(json.dumps(config, indent=2) + "\n")
