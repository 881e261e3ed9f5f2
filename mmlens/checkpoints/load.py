"""The one way in for checkpoints of every format: `load_model`."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmlens.checkpoints.devices import DeviceMap
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.formats import FORMATS, Format
from mmlens.checkpoints.hf_configs import generation_config
from mmlens.checkpoints.hub import find_folder
from mmlens.checkpoints.json_files import check_folder, read_json
from mmlens.checkpoints.loader import Weights, build, check_layers, has_own_head
from mmlens.checkpoints.paths import checkpoint_errors, regular_file
from mmlens.checkpoints.processors import (
    IMAGE_PLACEHOLDER,
    add_image_token,
    chat_template,
    learn_placeholder,
    load_image_processor,
    load_tokenizer,
)
from mmlens.checkpoints.towers.named_towers import Tower, with_tower
from mmlens.checkpoints.weight_files import warn_of_another_set, weight_files
from mmlens.config import MultimodalConfig
from mmlens.config.images import MOST_TILES
from mmlens.demo import is_embedded
from mmlens.inputs.images import largest_edge, sides_of
from mmlens.inputs.processor import Processor
from mmlens.model.transformer import HookedMultimodalTransformer

DTYPES = ("float32", "float16", "bfloat16", "float64")


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
    file = Path(os.path.expanduser(name_or_path))
    is_gguf = file.suffix == ".gguf" and file.exists()
    whole = is_embedded(name_or_path) or is_gguf
    for name, given in (("device_map", device_map), ("vision_tower", vision_tower)):
        if whole and given is not None:
            raise CheckpointError(
                f"{name}={str(given)!r}: {name_or_path} is loaded as it is, and to one device; "
                "checkpoint folders take it"
            )
    if is_embedded(name_or_path):
        from mmlens.checkpoints.formats import demo

        return demo.load(str(name_or_path), where, dtype or torch.float32)
    if is_gguf:
        from mmlens.checkpoints.formats import gguf

        return gguf.load(regular_file(file), where, dtype or torch.float32)
    folder = find_folder(name_or_path, revision)
    check_folder(folder)
    check_no_adapter(folder)
    format = format_of(folder)
    own_dtype = checkpoint_dtype(folder)
    with checkpoint_errors(folder / "config.json"):
        tower = tower_of(format, folder, vision_tower)
        cfg = format.config(folder, tower)
    weights = weights_of(format, folder, cfg, tower, always=vision_tower is not None)
    warn_of_another_set(folder)
    model = build(
        cfg,
        weights,
        dtype=dtype or own_dtype,
        device=where,
        device_map=device_map,
        where=str(folder),
    )
    cfg.model_name = str(name_or_path)
    model.checkpoint = folder.absolute()
    equip(model, folder, tower)
    return model


def check_no_adapter(folder: Path) -> None:
    """Raise a CheckpointError for a folder with an adapter of peft, which transformers would add.

    And it would add it to the weights that the adapter names, whatever lies beside it.
    """
    path = folder / "adapter_config.json"
    if os.path.lexists(path):
        base = read_json(path, folder).get("base_model_name_or_path")
        raise CheckpointError(
            f"{path}: the folder has an adapter of peft, which transformers would add to the "
            f"weights of {base!r}; mmlens reads whole models: merge the two (peft's "
            "merge_and_unload) and save what comes out, or take adapter_config.json away to read "
            "the weights here without it"
        )


def load_processor(name_or_path: str | Path, *, revision: str | None = None) -> Processor:
    """The processor of a checkpoint, whose weights are not read.

    Raises:
        CheckpointError: it is not there, or is of no known format.
    """
    if is_embedded(name_or_path):
        from mmlens.checkpoints.formats import demo

        return demo.load_processor(str(name_or_path))
    file = Path(os.path.expanduser(name_or_path))
    if file.suffix == ".gguf" and file.exists():
        from mmlens.checkpoints.formats import gguf

        return gguf.load_processor(regular_file(file))
    folder = find_folder(name_or_path, revision)
    check_folder(folder)
    format = format_of(folder)
    with checkpoint_errors(folder / "config.json"):
        tower = tower_of(format, folder, None)
        cfg = format.config(folder, tower)
    return processor_of(cfg, folder, tower)


def weights_of(
    format: Format,
    folder: Path,
    cfg: MultimodalConfig,
    tower: Tower | None,
    *,
    always: bool,
) -> Weights:
    """Return the weight files of a model, and where their tensors go; `cfg` learns of a tie.

    Args:
        always: take the tower's own weights even where the checkpoint has some.
    """
    files = weight_files(folder)
    with checkpoint_errors(folder / "config.json"):
        tied, untied = (
            format.table(replace(cfg, tie_word_embeddings=tie)) for tie in (True, False)
        )
    if cfg.tie_word_embeddings:
        cfg.tie_word_embeddings = not has_own_head(files, format.rename, untied)
    table = tied if cfg.tie_word_embeddings else untied
    weights = Weights(files, table, format.ignored, format.rename)
    if tower is not None and cfg.vision is not None:
        with checkpoint_errors(folder):
            weights = with_tower(weights, tower, cfg.vision, always=always)
    check_layers(cfg, weights.files, folder)
    return weights


def tower_of(format: Format, folder: Path, given: str | Path | None) -> Tower | None:
    """Return the tower that a format of LLaVA's code names; None for other formats."""
    if format.tower is not None:
        return format.tower(folder, given)
    if given is not None:
        raise CheckpointError(
            f"vision_tower={str(given)!r}: {folder} has a format that holds its own tower, or none"
        )
    return None


def equip(model: HookedMultimodalTransformer, folder: Path, tower: Tower | None) -> None:
    """Give the model the folder's tokenizer, image processor, template and generation config."""
    model.generation_config = generation_config(folder, model.cfg.pad_token_id)
    processor = processor_of(model.cfg, folder, tower)
    model.tokenizer, model.image_processor = processor.tokenizer, processor.image_processor


def processor_of(cfg: MultimodalConfig, folder: Path, tower: Tower | None) -> Processor:
    """The folder's tokenizer and image processor; `cfg` learns the template and the image token."""
    tokenizer = load_tokenizer(folder)
    if tower is None:
        if tokenizer is not None:
            if cfg.image_placeholder != IMAGE_PLACEHOLDER:
                learn_placeholder(tokenizer)
            sees = cfg.vision is not None
            written = chat_template(folder, tokenizer, sees, cfg.image_placeholder)
            cfg.default_template = written or cfg.default_template
        image_processor = load_image_processor(folder) if cfg.vision else None
    else:
        with checkpoint_errors(folder, "the image processor: "):
            image_processor = tower.image_processor()
        if tokenizer is not None:
            cfg.image_token_id = add_image_token(tokenizer)
    check_processor(image_processor, cfg, folder)
    return Processor(cfg, tokenizer, image_processor)


def check_processor(processor: Any, cfg: MultimodalConfig, folder: Path) -> None:
    """Raise a CheckpointError where images are made far larger than the tower takes them.

    Whether an image itself is too large is seen when it is given.
    """
    if cfg.vision is None or processor is None:
        return
    check_fields(processor, folder)
    if cfg.vision.packed:  # whose "edges" are areas
        area, most = sides_of(processor.size).get("shortest_edge", 0), Image.MAX_IMAGE_PIXELS
        if most is not None and area > most:
            raise CheckpointError(
                f"{folder}: its image processor scales images to at least {area:,} pixels, more "
                f"than {most:,}"
            )
        return
    edges, tower = {"size": largest_edge(processor)}, max(cfg.vision.image_size)
    if getattr(processor, "do_center_crop", False):  # else its size says nothing
        edges["crop_size"] = max(sides_of(processor.crop_size).values(), default=0)
    tiles = sides_of(getattr(processor, "max_image_size", None))
    edges["max_image_size"] = max(tiles.values(), default=0)
    for name, edge in edges.items():
        if edge > 8 * tower:
            raise CheckpointError(
                f"{folder}: its image processor scales images to {edge:,} pixels ({name}), but "
                f"its tower takes {tower:,}"
            )
    n_tiles = getattr(processor, "max_patches", None) or 0
    if n_tiles > MOST_TILES:
        raise CheckpointError(
            f"{folder}: its image processor cuts images into {n_tiles:,} tiles (max_patches); an "
            f"image may have {MOST_TILES}"
        )


def check_fields(processor: Any, folder: Path) -> None:
    """Raise a CheckpointError where an image processor would give NaN, or fail at each image."""

    def refuse(name: str, what: str) -> None:
        raise CheckpointError(
            f"{folder}: its image processor has {name}={getattr(processor, name)!r}; {what}"
        )

    for name, may_be_zero in (("image_mean", True), ("image_std", False), ("rescale_factor", True)):
        given = getattr(processor, name, None)
        for number in given if isinstance(given, list | tuple) else [given]:
            if number is None:
                continue
            if not isinstance(number, int | float) or not math.isfinite(number):
                refuse(name, "all of it must be finite numbers")
            if not (may_be_zero or number):
                refuse(name, "pixels are divided by it, so nothing of it may be 0")
    for name in ("size", "crop_size"):
        if min(sides_of(getattr(processor, name, None)).values(), default=1) < 1:
            refuse(name, "a side has one pixel or more")
    if getattr(processor, "resample", None) not in (None, *Image.Resampling):
        refuse(
            "resample",
            f"it is one of {', '.join(f'{it:d} ({it.name})' for it in Image.Resampling)}",
        )


def format_of(folder: Path) -> Format:
    """Return the format that recognises the folder's config.json."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        others = sorted(folder.glob("*.gguf"))
        hint = f"; {others[0]} is a checkpoint by itself" if others else ""
        raise CheckpointError(f"{folder} has no config.json: not a checkpoint folder{hint}")
    config = read_json(path, folder)
    if quantised := config.get("quantization_config"):
        named = quantised.get("quant_method") if isinstance(quantised, dict) else None
        method = named or "an unknown method"
        raise CheckpointError(
            f"{path} says that the weights are quantised ({method}); mmlens reads and edits plain "
            "ones: take the checkpoint that it was made from"
        )
    with checkpoint_errors(path):
        for format in reversed(FORMATS.values()):
            if format.recognises(config):
                return format
    kind = str(config.get("model_type"))
    if kind.endswith("_moe"):
        raise CheckpointError(
            f"{path}: model_type {kind!r}: its layers are mixtures of experts, which mmlens does "
            f"not build; take a dense model of the same family ({kind.removesuffix('_moe')})"
        )
    raise CheckpointError(
        f"{path}: model_type {config.get('model_type')!r}, architectures "
        f"{config.get('architectures')} is no format that mmlens knows; it knows "
        f"{', '.join(FORMATS)}"
    )


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that config.json names (at the top or for the text model), else float32."""
    path = folder / "config.json"
    config = read_json(path, folder)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if name:
            if str(name).removeprefix("torch.") not in DTYPES:
                raise CheckpointError(f"{path}: dtype is {name!r}; known are {', '.join(DTYPES)}")
            return getattr(torch, str(name).removeprefix("torch."))
    return torch.float32
