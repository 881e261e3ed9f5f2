r"""What the formats of LLaVA's code and its descendants (Bunny, LLaVA-Phi) share.

config.json is the decoder's, with fields for the rest: `mm_vision_tower` (the tower's name),
`mm_vision_select_layer`, `mm_vision_select_feature`, `mm_projector_type`, `image_aspect_ratio`.

There is no image token in the vocabulary: images are spliced in at a placeholder. Here that is
the first id after the vocabulary, or that of an `<image>` token added to the tokenizer.

Source: LLaVA, `model/llava_arch.py`, `model/multimodal_encoder/`, `model/multimodal_projector/`,
`conversation.py` and `mm_utils.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from mmlens.checkpoints.decoders import decoder_fields_in
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hf_configs import anyres_config
from mmlens.checkpoints.json_files import read_json
from mmlens.checkpoints.names import TOWER, Names, sequential, under
from mmlens.checkpoints.towers.named_towers import Tower, find_tower
from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig

# Bunny, TinyLLaVA and LLaVA-Phi have taken over LLaVA's "vicuna_v1" to the letter.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

# Choices that change what visual tokens are made of, and those of them that are built here.
SUPPORTED = {
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("square", "pad"),
    "s2": (False,),
    "use_s2": (False,),
}
TILES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
"""LLaVA 1.6: the two go together."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, refused where it asks for something that is not built here.

    Raises:
        CheckpointError: several scales of an image, or tiles in another way than LLaVA 1.6's.
    """
    config = read_json(folder / "config.json", folder)
    for key, supported in SUPPORTED.items():
        value = config.get(key)
        if value is not None and value not in supported and not (in_tiles(config) and key in TILES):
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {value!r}; supported: "
                f"{', '.join(map(repr, supported))}"
            )
    return config


def in_tiles(config: dict[str, Any]) -> bool:
    """Whether images are cut into tiles, as LLaVA 1.6 does it."""
    return all(config.get(key) == value for key, value in TILES.items())


def resolutions(config: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return `image_grid_pinpoints`, which LLaVA's code has as (width, height), the other way.

    Raises:
        CheckpointError: no pairs of numbers; LLaVA's code takes a text of such a list as well.
    """
    pairs: Any = config.get("image_grid_pinpoints")
    try:
        pairs = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
        return [(height, width) for width, height in pairs]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"image_grid_pinpoints is {str(pairs)[:99]}; it must be a list of pairs (width, height)"
        ) from error


def named_tower(folder: Path, given: str | Path | None) -> Tower:
    """Return the tower that config.json names, or another one instead."""
    config = read_config(folder)
    name = given or config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(name, str | Path):
        raise CheckpointError(
            f"{folder / 'config.json'} names no vision tower (mm_vision_tower is {name!r})"
        )
    return prepared(find_tower(name, folder if given is None else None), config)


def prepared(tower: Tower, config: dict[str, Any]) -> Tower:
    """Return the tower with images padded to a square in its mean colour, or cut into tiles.

    Raises:
        CheckpointError: tiles for one of open_clip's towers, or of unknown sizes.
    """
    if in_tiles(config):
        return tower.tiled(resolutions(config))
    return tower.padded(config.get("image_aspect_ratio") == "pad")


def tower_part(config: dict[str, Any], tower: Tower) -> VisionConfig:
    """Return what LLaVA's code takes of a tower: the patches of one layer, unnormalised.

    `mm_vision_select_feature` is `patch`, or `cls_patch`, which keeps CLIP's class token.
    """
    layer = config.get("mm_vision_select_layer")
    feature = config.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or feature not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"mm_vision_select_layer is {layer!r} and mm_vision_select_feature {feature!r}; they "
            "must be an integer, and 'patch' or 'cls_patch'"
        )
    part = tower.vision_config(layer, "full")
    drops_class_token = feature == "patch" and part.class_token
    return replace(part, select="default") if drops_class_token else part


def llava_config(
    folder: Path,
    tower: Tower | None,
    *,
    architecture: str,
    decoder: str | None = None,
    fields: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    features: Callable[[dict[str, Any], Tower], VisionConfig] = tower_part,
    **changes: Any,
) -> MultimodalConfig:
    """Return the configuration of a checkpoint's model in our terms.

    Args:
        folder: has a config.json, and may have a generation_config.json.
        tower: the vision tower that is built; there is always one.
        architecture: the class that has written it.
        decoder: transformers' `model_type` of the decoder; None where `fields` have it.
        fields: brings config.json to LLaVA's own terms: those of the decoder as transformers has
            them, and `mm_vision_select_layer`, `mm_vision_select_feature`, `mm_projector_type`.
        features: what is taken of the tower.
        changes: fields that differ from the decoder's.

    Raises:
        CheckpointError: a decoder, tower, projector or treatment of images that is not supported.
    """
    assert tower is not None  # the formats of LLaVA's code have `Format.tower`
    llava = fields(read_config(folder))
    kind = decoder or llava["model_type"]
    decoder = CONFIG_MAPPING[kind].from_dict(llava | {"model_type": kind})
    text = decoder_fields_in(folder, decoder)
    vision = features(llava, tower)
    projector = projector_config(
        llava.get("mm_projector_type", "linear"), vision.d_model, text["d_model"]
    )
    if in_tiles(llava):
        projector.anyres = anyres_config(resolutions(llava), vision, rounded=False)
    return MultimodalConfig(
        **text | changes,
        image_token_id=text["d_vocab"],
        image_layout="anyres" if projector.anyres else "one_grid",
        vision=vision,
        projector=projector,
        original_architecture=architecture,
        default_template=template(llava),
    )


def projector_config(kind: str, d_in: int, d_model: int) -> ProjectorConfig:
    """Return the projector that `mm_projector_type` names: linear, mlp2x_gelu, mlp3x_gelu ..."""
    depth = re.fullmatch(r"mlp([2-9]|\d\d)x_gelu", str(kind))
    if not depth and kind != "linear":
        raise CheckpointError(
            f"mm_projector_type is {kind!r}; supported: linear, mlp2x_gelu, mlp3x_gelu, ..."
        )
    n_layers = int(depth[1]) if depth else 1
    return ProjectorConfig(d_in=d_in, d_hidden=d_model, d_out=d_model, n_layers=n_layers)


def llava_names(decoder: Names, tower: str) -> Callable[[MultimodalConfig], Names]:
    """Return `Format.names` for a decoder under `model.` and a CLIP or SigLIP under `tower`."""
    fixed = under("model.", decoder) | {"lm_head": "unembed"} | under(tower, TOWER)
    fixed["model.image_newline"] = "projector.line_ends.newline"
    return lambda cfg: fixed | sequential(cfg.projector, "model.mm_projector")


def template(config: dict[str, Any]) -> str:
    """Return LLaVA's conversation `vicuna_v1`."""
    marks = ("<im_start>", "<im_end>") if config.get("mm_use_im_start_end") else ("", "")
    return f"{SYSTEM} USER: {marks[0]}<image>{marks[1]}\n{{question}} ASSISTANT:"
