"""Published checkpoint formats, one file each, and the one way in: `load_model`.

A format is a module with `recognises(config_json)`, `config(folder)`, `rename(name)`, `table(cfg)`
and `IGNORED`; to add one, write that file and name it in `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch

from mmlens.checkpoints import hf_llava, language_model
from mmlens.checkpoints.devices import DeviceMap
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hub import find_folder
from mmlens.checkpoints.loader import build, has_own_head
from mmlens.checkpoints.names import Table
from mmlens.checkpoints.processors import chat_template, load_image_processor, load_tokenizer
from mmlens.checkpoints.weight_files import weight_files
from mmlens.config import MultimodalConfig
from mmlens.model import HookedMultimodalTransformer

__all__ = ["FORMATS", "CheckpointError", "CheckpointFormat", "format_of", "load_model"]


@runtime_checkable
class CheckpointFormat(Protocol):
    """What a format's module provides."""

    IGNORED: Sequence[str]
    recognises: Callable[[dict[str, Any]], bool]
    config: Callable[[Path], MultimodalConfig]
    rename: Callable[[str], str]
    table: Callable[[MultimodalConfig], Table]


FORMATS: dict[str, CheckpointFormat] = {
    "Hugging Face LLaVA": cast(CheckpointFormat, hf_llava),
    "language model": cast(CheckpointFormat, language_model),
}


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
) -> HookedMultimodalTransformer:
    """The model of a checkpoint folder, a GGUF file, a hub name, or "demo".

    Raises:
        CheckpointError: it is not there, is of no known format, is quantised, or does not fit its
            config.json; or `device_map` does not fit the model.
        ValueError: both `device` and `device_map`.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of the two")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if str(name_or_path) == "demo":
        from mmlens.checkpoints import demo

        return demo.load(where, dtype or torch.float32)
    if str(name_or_path).endswith(".gguf") and Path(name_or_path).expanduser().is_file():
        from mmlens.checkpoints import gguf

        return gguf.load(Path(name_or_path).expanduser(), where, dtype or torch.float32)
    folder = find_folder(name_or_path, revision)
    format = format_of(folder)
    cfg = format.config(folder)
    files = weight_files(folder)
    if cfg.tie_word_embeddings:
        untied = format.table(replace(cfg, tie_word_embeddings=False))
        cfg.tie_word_embeddings = not has_own_head(files, format.rename, untied)
    model = build(
        cfg,
        files,
        format.table(cfg),
        ignored=format.IGNORED,
        rename=format.rename,
        dtype=dtype or checkpoint_dtype(folder),
        device=where,
        device_map=device_map,
        where=str(folder),
    )
    cfg.model_name = str(name_or_path)
    cfg.default_template = chat_template(folder, with_image=cfg.vision is not None)
    model.tokenizer = load_tokenizer(folder)
    model.image_processor = load_image_processor(folder) if cfg.vision else None
    return model


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
