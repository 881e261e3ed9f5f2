r"""TinyLLaVA: `TinyLlavaForConditionalGeneration` (tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B).

Decoder: Phi-2 (or Llama, Qwen2), transformers' own, under `language_model.`. Tower: SigLIP so400m
384 or CLIP, under `vision_tower._vision_tower.vision_model.`. Connector: `connector._connector`.

Features: the output of layer `vision_feature_layer` (-2), unnormalised, without the first position
(`vision_feature_select_strategy: patch`). SigLIP has no class token, so that its first patch is
lost: 728 visual tokens.

Prompt: as LLaVA's, without BOS for Phi. Images: resized to 384 x 384, or first padded to a square
(`image_aspect_ratio: pad`).

Source: TinyLLaVA Factory, `model/modeling_tinyllava.py`, `model/vision_tower/base.py`,
`model/connector/mlp.py`, `data/template/phi_template.py`, `data/image_preprocess.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmlens.checkpoints.decoders import decoder_names
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats.llava_code import llava_config, prepared, read_config
from mmlens.checkpoints.names import TOWER, sequential, under
from mmlens.checkpoints.towers.named_towers import (
    Tower,
    cached_folder,
    described_tower,
    find_tower,
    local_folder,
    unused,
)
from mmlens.config import MultimodalConfig, VisionConfig

SELECT = {"patch": "default", "cls_patch": "full"}


def tower(folder: Path, given: str | Path | None) -> Tower:
    """Return the tower that config.json spells out, or another one instead."""
    tiny = read_config(folder)
    if given is not None:
        return prepared(find_tower(given), tiny)
    name = str(tiny.get("vision_model_name_or_path") or "").split(":")[-1]
    own = local_folder(name, folder) or cached_folder(name)
    return prepared(described_tower(name, tiny["vision_config"], own), tiny)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json in the terms of LLaVA's code, but for the feature's selection."""
    return config["text_config"] | {
        "mm_projector_type": config.get("connector_type"),
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": config.get("vision_feature_select_strategy", "patch"),
    }


def features(config: Mapping[str, Any], tower: Tower) -> VisionConfig:
    """Return what is taken of the tower; `patch` drops the first position, whatever it is."""
    strategy = config["mm_vision_select_feature"]
    if strategy not in SELECT:
        raise CheckpointError(
            f"vision_feature_select_strategy is {strategy!r}; it can be 'patch' or 'cls_patch'"
        )
    return tower.vision_config(config["mm_vision_select_layer"], SELECT[strategy])


def names(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the name table: the decoder's, the tower's and the connector's."""
    return (
        decoder_names(cfg, "language_model.")
        | under("vision_tower._vision_tower.vision_model.", TOWER)
        | sequential(cfg.projector, "connector._connector")
    )


FORMAT = Format(
    "TinyLLaVA",
    lambda config: config.get("model_type") == "tinyllava",
    partial(
        llava_config,
        architecture="TinyLlavaForConditionalGeneration",
        fields=fields,
        features=features,
    ),
    names,
    ignored=(
        *unused(r"vision_tower\._vision_tower\.vision_model\."),
        r"language_model\.model\..*rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",  # a copy of tied embeddings
    ),
    tower=tower,
)
