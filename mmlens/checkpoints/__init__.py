"""Published checkpoint formats, one file each, and the one way in: `load_model`.

A format is a module with `recognises(config_json)`, `config(folder)`, `rename(name)`, `table(cfg)`
and `IGNORED`; to add one, write that file and name it in `FORMATS`. A format whose vision tower may
lie elsewhere also has `vision_tower(folder, given)`, and `config(folder, tower)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch

from mmlens.checkpoints import (
    bunny,
    hf_llava,
    language_model,
    llava_original,
    llava_phi,
    llava_phi_msft,
    tinyllava,
)
from mmlens.checkpoints.devices import DeviceMap
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hub import find_folder
from mmlens.checkpoints.loader import build, has_own_head
from mmlens.checkpoints.names import Table
from mmlens.checkpoints.processors import (
    add_image_token,
    begins_with_bos,
    chat_template,
    load_image_processor,
    load_tokenizer,
)
from mmlens.checkpoints.towers import Tower, Weights, with_tower
from mmlens.checkpoints.weight_files import weight_files
from mmlens.config import MultimodalConfig
from mmlens.model import HookedMultimodalTransformer

__all__ = ["FORMATS", "CheckpointError", "CheckpointFormat", "format_of", "load_model"]


@runtime_checkable
class CheckpointFormat(Protocol):
    """What a format's module provides."""

    IGNORED: Sequence[str]
    recognises: Callable[[dict[str, Any]], bool]
    config: Callable[..., MultimodalConfig]
    rename: Callable[[str], str]
    table: Callable[[MultimodalConfig], Table]


@runtime_checkable
class FormatWithTower(CheckpointFormat, Protocol):
    """A format of LLaVA's code, which only names its tower."""

    vision_tower: Callable[[Path, str | Path | None], Tower]


FORMATS: dict[str, CheckpointFormat] = {
    "Hugging Face LLaVA": cast(CheckpointFormat, hf_llava),
    "original LLaVA": cast(CheckpointFormat, llava_original),
    "Bunny": cast(CheckpointFormat, bunny),
    "TinyLLaVA": cast(CheckpointFormat, tinyllava),
    "LLaVA-Phi, first layout": cast(CheckpointFormat, llava_phi_msft),
    "LLaVA-Phi": cast(CheckpointFormat, llava_phi),
    "language model": cast(CheckpointFormat, language_model),
}


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
    vision_tower: str | Path | None = None,
) -> HookedMultimodalTransformer:
    """The model of a checkpoint folder, a GGUF file, a hub name, "demo" or "demo-tuned".

    Args:
        vision_tower: a folder or hub name to take the tower from, for the formats of LLaVA's code;
            by default it is the checkpoint's own, or else the one that config.json names.

    Raises:
        CheckpointError: it is not there, is of no known format, is quantised, or does not fit its
            config.json; or `device_map` does not fit the model; or the tower is not to be had.
        ValueError: both `device` and `device_map`.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of the two")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if str(name_or_path) in ("demo", "demo-tuned"):
        from mmlens.checkpoints import demo

        return demo.load(str(name_or_path), where, dtype or torch.float32)
    if str(name_or_path).endswith(".gguf") and Path(name_or_path).expanduser().is_file():
        from mmlens.checkpoints import gguf

        return gguf.load(Path(name_or_path).expanduser(), where, dtype or torch.float32)
    folder = find_folder(name_or_path, revision)
    format = format_of(folder)
    tower = tower_of(format, folder, vision_tower)
    cfg = format.config(folder) if tower is None else format.config(folder, tower)
    files = weight_files(folder)
    if cfg.tie_word_embeddings:
        untied = format.table(replace(cfg, tie_word_embeddings=False))
        cfg.tie_word_embeddings = not has_own_head(files, format.rename, untied)
    weights = Weights(files, format.table(cfg), tuple(format.IGNORED), format.rename)
    if tower is not None and cfg.vision is not None:
        weights = with_tower(weights, tower, cfg.vision, always=vision_tower is not None)
    model = build(
        cfg,
        **weights._asdict(),
        dtype=dtype or checkpoint_dtype(folder),
        device=where,
        device_map=device_map,
        where=str(folder),
    )
    cfg.model_name = str(name_or_path)
    model.checkpoint = folder.absolute()
    equip(model, folder, tower)
    return model


def tower_of(format: CheckpointFormat, folder: Path, given: str | Path | None) -> Tower | None:
    """The tower that a format of LLaVA's code names; None for other formats.

    Raises:
        CheckpointError: one is given for another format.
    """
    if isinstance(format, FormatWithTower):
        return format.vision_tower(folder, given)
    if given is not None:
        raise CheckpointError(
            f"vision_tower={str(given)!r}: {folder} has a format that holds its own tower, or none"
        )
    return None


def equip(model: HookedMultimodalTransformer, folder: Path, tower: Tower | None) -> None:
    """Give the model the folder's tokenizer, image processor and prompt template."""
    cfg = model.cfg
    model.tokenizer = load_tokenizer(folder)
    if tower is None:
        cfg.default_template = chat_template(folder, with_image=cfg.vision is not None)
        model.image_processor = load_image_processor(folder) if cfg.vision else None
        return
    model.image_processor = tower.image_processor()
    if model.tokenizer is not None:
        cfg.image_token_id = add_image_token(model.tokenizer)
        cfg.default_prepend_bos = begins_with_bos(model.tokenizer)


def format_of(folder: Path) -> CheckpointFormat:
    """The format that recognises the folder's config.json.

    Raises:
        CheckpointError: no config.json, or nobody knows it.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json: not a checkpoint folder")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise CheckpointError(
            f"{folder} is quantised ({method}); mmlens reads and edits plain weights: take the "
            "checkpoint that it was made from"
        )
    for format in FORMATS.values():
        if format.recognises(config):
            return format
    raise CheckpointError(
        f"{path}: model_type {config.get('model_type')!r}, architectures "
        f"{config.get('architectures')} is no format that mmlens knows; it knows "
        f"{', '.join(FORMATS)}"
    )


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype that config.json names (at the top or for the text model), else float32."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config") or {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if name:
            return getattr(torch, str(name).removeprefix("torch."))
    return torch.float32
