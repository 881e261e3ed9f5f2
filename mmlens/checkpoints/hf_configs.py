"""Hugging Face configurations, translated: vision towers and the settings of generation.

Source: transformers, `configuration_*.py` and `modeling_*.py` of clip and siglip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.json_files import read_json
from mmlens.config import AnyResConfig, VisionConfig
from mmlens.model.components.activations import is_activation
from mmlens.model.decoding import setting_names

GENERATION_CONFIG = "generation_config.json"
TOWERS = ("clip_vision_model", "siglip_vision_model")


def vision_config(
    config: PreTrainedConfig, feature_layer: int | Sequence[int], select: Any
) -> VisionConfig:
    """A transformers CLIP or SigLIP vision configuration, and what LLaVA takes of the tower.

    Args:
        feature_layer: index into transformers' `hidden_states`: 0 is the input of the first block,
            -1 the output of the last, -2 of the one before. A list is concatenated.
        select: "default" drops the first position (CLIP's class token), "full" keeps all.

    Raises:
        CheckpointError: another kind of tower, or a layer, a `select` or an activation function
            that is not there.
    """
    if config.model_type not in TOWERS:
        raise CheckpointError(f"a {config.model_type!r} tower; supported are {', '.join(TOWERS)}")
    is_clip = config.model_type == "clip_vision_model"
    layers = feature_layers(config.num_hidden_layers, feature_layer, select)
    return VisionConfig(
        n_layers=max(layers),
        **tower_fields(config),
        patch_bias=not is_clip,
        class_token=is_clip,
        pre_norm=is_clip,
        feature_layers=layers,
        select=select,
    )


def known_activation(name: Any, field: str) -> str:
    """Return the name of an activation function.

    Args:
        field: where config.json says it.

    Raises:
        CheckpointError: transformers has none of that name.
    """
    if not is_activation(name):
        raise CheckpointError(f"{field} is {name!r}; known are {', '.join(sorted(ACT2FN))}")
    return name


def tower_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a `VisionConfig` that CLIP, SigLIP and Idefics3 call alike in transformers."""
    size = config.image_size
    return {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_head": config.hidden_size // config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "act_fn": known_activation(config.hidden_act, "vision_config.hidden_act"),
        "normalization_type": "LN",
        "eps": config.layer_norm_eps,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "patch_size": config.patch_size,
        "n_channels": config.num_channels,
    }


def anyres_config(resolutions: Any, vision: VisionConfig, **choices: Any) -> AnyResConfig:
    """Return how images of any resolution are cut into tiles.

    Args:
        resolutions: "grid pinpoints", pairs (height, width).
        vision: the tower, whose images are the tiles.
        choices: other fields of `AnyResConfig`.

    Raises:
        CheckpointError: tiles that are no squares, or whose features are not their patches.
    """
    rows, columns = vision.grid
    if rows != columns or vision.image_size[0] != vision.image_size[1]:
        raise CheckpointError(f"tiles of {vision.image_size} pixels; they must be squares")
    if vision.n_visual_tokens != vision.n_patches:
        raise CheckpointError(
            f"a tile of {vision.n_patches} patches has {vision.n_visual_tokens} features; these "
            "must be its patches alone, for they are put together to lines"
        )
    if not isinstance(resolutions, list) or not all(
        isinstance(pair, list | tuple) and [type(side) for side in pair] == [int, int]
        for pair in resolutions
    ):
        raise CheckpointError(
            f"image_grid_pinpoints is {str(resolutions)[:99]}; it must be a list of pairs of whole "
            "numbers, two sides in pixels each"
        )
    pairs = tuple((height, width) for height, width in resolutions)
    return AnyResConfig(
        resolutions=pairs, tile_size=vision.image_size[0], tile_grid=vision.grid, **choices
    )


def feature_layers(
    n_layers: int, feature_layer: int | Sequence[int], select: Any
) -> tuple[int, ...]:
    """Return which layers of a tower have the features, counted from the front."""
    if select not in ("default", "full"):
        raise CheckpointError(
            f"vision_feature_select_strategy is {select!r}; it can be 'full', or 'default', which "
            "drops the first position"
        )
    wanted = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    if not wanted or not all(-n_layers - 1 <= layer <= n_layers for layer in wanted):
        raise CheckpointError(
            f"vision_feature_layer is {feature_layer}, but a tower of {n_layers} layers has "
            f"features 0 ... {n_layers} (or -{n_layers + 1} ... -1)"
        )
    return tuple(layer + n_layers + 1 if layer < 0 else layer for layer in wanted)


def generation_ends(folder: Path, default: tuple[int, ...]) -> tuple[int, ...]:
    """End tokens of generation_config.json, which may be more than config.json's one."""
    ends = settings_in(folder / GENERATION_CONFIG).get("eos_token_id")
    if ends is None:
        return default
    return tuple(ends) if isinstance(ends, list) else (ends,)


def generation_config(folder: Path, pad_token_id: int | None) -> GenerationConfig:
    """Return the folder's settings of generation, but for the end tokens, which a config has.

    Without a generation_config.json, settings in the folder's config.json count, as in
    transformers, and `pad_token_id`.
    """
    file = folder / GENERATION_CONFIG
    settings = settings_in(file)
    if not file.exists():
        file = folder / "config.json"
        settings = {"pad_token_id": pad_token_id} | settings_in(file)
    settings.pop("eos_token_id", None)
    try:
        return GenerationConfig(**settings)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error


def settings_in(file: Path) -> dict[str, Any]:
    """Return the settings of generation in a JSON file of a folder; {} without the file."""
    found, names = read_json(file, file.parent) if file.exists() else {}, setting_names()
    return {name: value for name, value in found.items() if name in names and value is not None}
