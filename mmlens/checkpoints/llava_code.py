r"""What the formats of LLaVA's code and its descendants (Bunny, LLaVA-Phi) share.

config.json is the decoder's, with fields for the rest: `mm_vision_tower` (the tower's name),
`mm_vision_select_layer`, `mm_vision_select_feature`, `mm_projector_type`, `image_aspect_ratio`.

There is no image token in the vocabulary: pictures are spliced in at a placeholder. Here that is
the first id behind the vocabulary, or that of an `<image>` token added to the tokenizer.

Source: LLaVA, `model/llava_arch.py`, `model/multimodal_encoder/`, `model/multimodal_projector/`,
`conversation.py` and `mm_utils.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hf_configs import decoder_fields, generation_ends
from mmlens.checkpoints.names import Table, projector_names
from mmlens.checkpoints.towers import Tower, find_tower
from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig

# Bunny, TinyLLaVA and LLaVA-Phi have taken over LLaVA's "vicuna_v1" to the letter.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

# Choices that change the number of visual tokens with the picture, or what they are made of.
UNSUPPORTED = {
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("square", "pad"),
    "s2": (False,),
    "use_s2": (False,),
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, refused where it asks for something that is not built here.

    Raises:
        CheckpointError: several crops of a picture (LLaVA 1.6), or several scales.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for key, supported in UNSUPPORTED.items():
        value = config.get(key)
        if value is not None and value not in supported:
            raise CheckpointError(
                f"{folder}: {key} is {value!r} in config.json; supported: "
                f"{', '.join(map(repr, supported))}"
            )
    return config


def named_tower(folder: Path, given: str | Path | None) -> Tower:
    """The tower that config.json names, or another one instead.

    Raises:
        CheckpointError: config.json names none, or it cannot be found.
    """
    config = read_config(folder)
    name = given or config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(name, str | Path):
        raise CheckpointError(
            f"{folder}: config.json names no vision tower (mm_vision_tower is {name!r})"
        )
    return padded(find_tower(name, folder if given is None else Path()), config)


def padded(tower: Tower, config: dict[str, Any]) -> Tower:
    """The tower with pictures padded to a square in its mean colour, if the config says so."""
    return tower.padded(config.get("image_aspect_ratio") == "pad")


def multimodal_config(
    folder: Path,
    config: dict[str, Any],
    *,
    decoder: str,
    vision: VisionConfig,
    projector: str,
    **changes: Any,
) -> MultimodalConfig:
    """The configuration in our terms.

    Args:
        folder: may have a generation_config.json.
        config: of the decoder, in transformers' terms.
        decoder: transformers' `model_type`.
        projector: `mm_projector_type`.
        changes: fields that differ from the decoder's.
    """
    fields = decoder_fields(CONFIG_MAPPING[decoder].from_dict(config | {"model_type": decoder}))
    fields["eos_token_ids"] = generation_ends(folder, fields["eos_token_ids"])
    return MultimodalConfig(
        **fields | changes,
        image_token_id=fields["d_vocab"],
        vision=vision,
        projector=projector_config(projector, vision.d_model, fields["d_model"]),
        default_template=template(config),
    )


def tower_part(config: dict[str, Any], tower: Tower) -> VisionConfig:
    """What LLaVA's code takes of a tower: the patches of one layer, unnormalised.

    `mm_vision_select_feature` is `patch`, or `cls_patch`, which keeps CLIP's class token.

    Raises:
        CheckpointError: no layer, or an unknown feature.
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


def projector_config(kind: str, d_in: int, d_model: int) -> ProjectorConfig:
    """The projector that `mm_projector_type` names.

    Raises:
        CheckpointError: none of `linear`, `mlp2x_gelu`, `mlp3x_gelu` ...
    """
    depth = re.fullmatch(r"mlp([2-9]|\d\d+)x_gelu", kind)
    if not depth and kind != "linear":
        raise CheckpointError(
            f"mm_projector_type is {kind!r}; supported: linear, mlp2x_gelu, mlp3x_gelu, ..."
        )
    n_layers = int(depth[1]) if depth else 1
    return ProjectorConfig(d_in=d_in, d_hidden=d_model, d_out=d_model, n_layers=n_layers)


def sequential_names(cfg: ProjectorConfig, name: str) -> Table:
    """A projector that is an `nn.Linear`, or an `nn.Sequential` with activations in between."""
    layers = [f"{name}.{2 * i}" for i in range(cfg.n_layers)] if cfg.n_layers > 1 else [name]
    return projector_names(cfg, layers)


def template(config: dict[str, Any]) -> str:
    """LLaVA's conversation `vicuna_v1`."""
    marks = ("<im_start>", "<im_end>") if config.get("mm_use_im_start_end") else ("", "")
    return f"{SYSTEM} USER: {marks[0]}<image>{marks[1]}\n{{question}} ASSISTANT:"
