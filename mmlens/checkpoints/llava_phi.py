r"""LLaVA-Phi: `LlavaPhiForCausalLM`, LLaVA's code around transformers' Phi.

Decoder: Phi-2, with or without a bias in the output layer. Tower: CLIP, at
`model.vision_tower.vision_model.` (LLaVA-Phi, whose config.json spells tower and projector out in
`vision_config`) or as in LLaVA's code. Projector: `model.mm_projector`.

Features: as LLaVA's; the same fields, in `vision_config.vision_tower` for LLaVA-Phi.

Prompt: as LLaVA's, without BOS. Pictures: the checkpoint's own preprocessor_config.json, padded to
a square if `image_aspect_ratio` is `pad`.

Source: LLaVA-Phi, `model/language_model/configuration_llava_phi.py`, `llava_phi.py`,
`model/multimodal_encoder/clip_encoder.py`, `conversation.py` (`conv_phi_v0`); MoE-LLaVA,
`model/language_model/llava_phi.py` (no bias). The older layout is in `llava_phi_msft.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmlens.checkpoints import llava_original
from mmlens.checkpoints.llava_code import (
    multimodal_config,
    named_tower,
    padded,
    read_config,
    sequential_names,
    tower_part,
)
from mmlens.checkpoints.names import Table, decoder_names, tower_names
from mmlens.checkpoints.towers import Tower, described_tower, unused
from mmlens.checkpoints.weight_files import has_tensor
from mmlens.config import MultimodalConfig

TOWER = "model.vision_tower.vision_model."
IGNORED = (*unused(r"model\.vision_tower\.vision_model\."), *llava_original.IGNORED)


def recognises(config: dict[str, Any]) -> bool:
    """Whether this is a LLaVA with a Phi decoder in transformers' naming."""
    architectures = config.get("architectures") or []
    return "LlavaPhiForCausalLM" in architectures or config.get("model_type") == "llava_phi"


def vision_tower(folder: Path, given: str | Path | None) -> Tower:
    """The tower that config.json names or spells out, or another one instead.

    Raises:
        CheckpointError: it names none, or it cannot be found.
    """
    llava = read_config(folder)
    if given is not None or "vision_config" not in llava:
        return named_tower(folder, given)
    described = llava["vision_config"]["vision_tower"] | {"model_type": "clip_vision_model"}
    name = str(described.get("_name_or_path") or "")
    return padded(described_tower(name, described, folder), llava)


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """The configuration in our terms.

    Raises:
        CheckpointError: a tower, projector or treatment of pictures that is not supported.
    """
    llava = read_config(folder)
    parts = llava.get("vision_config") or {"vision_tower": llava, "mm_projector": llava}
    decoder = {key: value for key, value in llava.items() if key != "vision_config"}
    return multimodal_config(
        folder,
        decoder,
        decoder="phi",
        vision=tower_part(parts["vision_tower"], tower or vision_tower(folder, None)),
        projector=parts["mm_projector"].get("mm_projector_type", "linear"),
        unembed_bias=has_tensor(folder, r"lm_head\.bias"),
        original_architecture="LlavaPhiForCausalLM",
    )


def rename(name: str) -> str:
    """A tensor's name as LLaVA-Phi has it."""
    return re.sub(r"^model\.vision_tower\.vision_tower\.", "model.vision_tower.", name)


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    assert cfg.vision is not None and cfg.projector is not None
    return (
        decoder_names(cfg)
        | tower_names(cfg.vision, TOWER)
        | sequential_names(cfg.projector, "model.mm_projector")
    )
