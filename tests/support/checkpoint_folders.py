"""Checkpoint folders: opened, edited in place, and rewritten in the layouts of other days."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlens.checkpoints.errors import CheckpointError
from mmlens.model.transformer import HookedMultimodalTransformer

WEIGHTS = "model.safetensors"


def load(folder: Path, **options: Any) -> HookedMultimodalTransformer:
    return HookedMultimodalTransformer.from_pretrained(folder, **{"device": "cpu", **options})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        if value is None:
            config.pop(name, None)
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def merge_config(folder: Path, change: Mapping[str, Any]) -> None:
    """Set fields of `config.json`; in a field that holds fields, only those that are given."""
    config = json.loads((folder / "config.json").read_text())
    merged = {
        name: config[name] | value if isinstance(value, dict) else value
        for name, value in change.items()
    }
    (folder / "config.json").write_text(json.dumps(config | merged))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def to_pickles(folder: Path, **options: Any) -> None:
    """The folder's safetensors as transformers once wrote them: `pytorch_model*.bin`.

    `options` go to `torch.save`.
    """
    for file in folder.glob("*.safetensors"):
        name = f"{file.stem.replace('model', 'pytorch_model')}.bin"
        torch.save(load_file(file), folder / name, **options)
        file.unlink()
    index = folder / f"{WEIGHTS}.index.json"
    if index.exists():
        text = index.read_text().replace('"model-', '"pytorch_model-')
        text = text.replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def same(a: HookedMultimodalTransformer, b: HookedMultimodalTransformer) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


def bare(name: str) -> str:
    """The name without any prefix that a layout has put in front, beginning with its part."""
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector|language_model)", "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    return re.sub(r"^language_model\.(?:model\.)?(?!lm_head)", "decoder.", name).replace(
        "language_model.lm_head", "lm_head"
    )


def first_layout(name: str) -> str:
    """transformers 4.36 ... 4.51."""
    name = re.sub("^decoder", "language_model.model", bare(name))
    name = re.sub("^lm_head", "language_model.lm_head", name)
    return re.sub("^vision_tower", "vision_tower.vision_model", name)


def second_layout(name: str) -> str:
    """transformers 4.52 and later."""
    name = re.sub("^decoder", "model.language_model", bare(name))
    name = re.sub("^vision_tower", "model.vision_tower.vision_model", name)
    return re.sub("^multi_modal_projector", "model.multi_modal_projector", name)


def third_layout(name: str) -> str:
    """transformers 5, in memory: the tower has lost its middle name."""
    return second_layout(name).replace("vision_tower.vision_model.", "vision_tower.")


LAYOUTS = [first_layout, second_layout, third_layout]


def refused(folder: Path | str, *said: str, **options: Any) -> None:
    """Assert that a folder is refused, with all that must be said."""
    with pytest.raises(CheckpointError) as error:
        load(folder, **options)  # type: ignore[arg-type]
    for text in said:
        assert text in str(error.value)
