r"""LLaVA-Phi: `LlavaPhiForCausalLM`, LLaVA's code around transformers' Phi.

Decoder: Phi-2, with or without a bias in the output layer. Tower: CLIP, at
`model.vision_tower.vision_model.` (LLaVA-Phi, whose config.json spells tower and projector out in
`vision_config`) or as in LLaVA's code. Projector: `model.mm_projector`.

Features: as LLaVA's; the same fields, in `vision_config.vision_tower` for LLaVA-Phi.

Prompt: as LLaVA's, without BOS. Images: the checkpoint's own preprocessor_config.json, padded to
a square if `image_aspect_ratio` is `pad`.

Source: LLaVA-Phi, `model/language_model/configuration_llava_phi.py`, `llava_phi.py`,
`model/multimodal_encoder/clip_encoder.py`, `conversation.py` (`conv_phi_v0`); MoE-LLaVA,
`model/language_model/llava_phi.py` (no bias). The older layout is in `llava_phi_msft.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlens.checkpoints.decoders import phi
from mmlens.checkpoints.format import Format, written_by
from mmlens.checkpoints.formats import llava_original
from mmlens.checkpoints.formats.llava_code import (
    llava_config,
    llava_names,
    named_tower,
    prepared,
    read_config,
)
from mmlens.checkpoints.towers.named_towers import Tower, described_tower, unused
from mmlens.checkpoints.weight_files import has_tensor
from mmlens.config import MultimodalConfig

is_llava_phi = written_by("LlavaPhiForCausalLM", "llava_phi")


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a LLaVA with a Phi decoder in transformers' naming."""
    return is_llava_phi(config) and "n_embd" not in config


def tower(folder: Path, given: str | Path | None) -> Tower:
    """Return the tower that config.json names or spells out, or another one instead."""
    llava = read_config(folder)
    if given is not None or "vision_config" not in llava:
        return named_tower(folder, given)
    described = llava["vision_config"]["vision_tower"] | {"model_type": "clip_vision_model"}
    name = str(described.get("_name_or_path") or "")
    return prepared(described_tower(name, described, folder), llava)


def config(folder: Path, tower: Tower | None) -> MultimodalConfig:
    """Return the configuration in our terms; see `llava_config`."""
    return llava_config(
        folder,
        tower,
        architecture="LlavaPhiForCausalLM",
        decoder="phi",
        fields=fields,
        unembed_bias=has_tensor(folder, r"lm_head\.bias"),
    )


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the fields of tower and projector where LLaVA's code has them."""
    flat = {key: value for key, value in config.items() if key != "vision_config"}
    for part in (config.get("vision_config") or {}).values():
        if isinstance(part, dict):
            flat |= {key: value for key, value in part.items() if key.startswith("mm_")}
    return flat


def rename(name: str) -> str:
    """Return a tensor's name as LLaVA-Phi has it."""
    return re.sub(r"^model\.vision_tower\.vision_tower\.", "model.vision_tower.", name)


FORMAT = Format(
    "LLaVA-Phi",
    recognises,
    config,
    names=llava_names(phi.NAMES, tower="model.vision_tower.vision_model."),
    ignored=(*unused(r"model\.vision_tower\.vision_model\."), *llava_original.IGNORED),
    rename=rename,
    tower=tower,
)
