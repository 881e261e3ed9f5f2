r"""TinyLLaVA: `TinyLlavaForConditionalGeneration` (tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B).

Decoder: Phi-2 (or Llama, Qwen2), transformers' own, under `language_model.`. Tower: SigLIP so400m
384 or CLIP, under `vision_tower._vision_tower.vision_model.`. Connector: `connector._connector`.

Features: the output of layer `vision_feature_layer` (-2), unnormalised, without the first position
(`vision_feature_select_strategy: patch`). SigLIP has no class token, so that its first patch is
lost: 728 visual tokens.

Prompt: as LLaVA's, without BOS for Phi. Pictures: resized to 384 x 384, or first padded to a square
(`image_aspect_ratio: pad`).

Source: TinyLLaVA Factory, `model/modeling_tinyllava.py`, `model/vision_tower/base.py`,
`model/connector/mlp.py`, `data/template/phi_template.py`, `data/image_preprocess.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.llava_code import (
    multimodal_config,
    padded,
    read_config,
    sequential_names,
)
from mmlens.checkpoints.names import Table, decoder_names, tower_names
from mmlens.checkpoints.towers import (
    Tower,
    cached_folder,
    described_tower,
    find_tower,
    local_folder,
    unused,
)
from mmlens.config import MultimodalConfig

TOWER = "vision_tower._vision_tower.vision_model."
IGNORED = (
    *unused(r"vision_tower\._vision_tower\.vision_model\."),
    r"language_model\.model\..*rotary_emb\.inv_freq",
    r"language_model\.lm_head\.weight",  # a copy of tied embeddings
)
SELECT = {"patch": "default", "cls_patch": "full"}


def recognises(config: dict[str, Any]) -> bool:
    """Whether TinyLLaVA Factory has written this."""
    return config.get("model_type") == "tinyllava"


def vision_tower(folder: Path, given: str | Path | None) -> Tower:
    """The tower that config.json spells out, or another one instead.

    Raises:
        CheckpointError: it is neither CLIP nor SigLIP.
    """
    tiny = read_config(folder)
    if given is not None:
        return padded(find_tower(given, Path()), tiny)
    name = str(tiny.get("vision_model_name_or_path") or "").split(":")[-1]
    own = local_folder(name, folder) or cached_folder(name)
    return padded(described_tower(name, tiny["vision_config"], own), tiny)


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """The configuration in our terms.

    Raises:
        CheckpointError: a decoder, tower or connector that is not supported.
    """
    tiny = read_config(folder)
    text, strategy = tiny["text_config"], tiny.get("vision_feature_select_strategy", "patch")
    if strategy not in SELECT:
        raise CheckpointError(
            f"{folder}: vision_feature_select_strategy is {strategy!r}; it can be 'patch' or "
            "'cls_patch'"
        )
    described = tower or vision_tower(folder, None)
    return multimodal_config(
        folder,
        text,
        decoder=text["model_type"],
        vision=described.vision_config(tiny.get("vision_feature_layer", -2), SELECT[strategy]),
        projector=str(tiny.get("connector_type")),
        original_architecture="TinyLlavaForConditionalGeneration",
    )


def rename(name: str) -> str:
    """Names are as they should be."""
    return name


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    assert cfg.vision is not None and cfg.projector is not None
    return (
        decoder_names(cfg, "language_model.model.", "language_model.lm_head")
        | tower_names(cfg.vision, TOWER)
        | sequential_names(cfg.projector, "connector._connector")
    )
