r"""Original LLaVA: `LlavaLlamaForCausalLM` (liuhaotian/llava-v1.5-7b, -13b and their like).

Decoder: Llama. Tower: CLIP, in the checkpoint (`model.vision_tower.vision_tower.vision_model.*`)
or, as for LLaVA 1.5, in its own. Projector: `model.mm_projector`, linear or with GELUs in between.

Features: the output of layer `mm_vision_select_layer` (-2: the last but one), without the class
token unless `mm_vision_select_feature` is `cls_patch`.

Prompt: `llava_code.SYSTEM`, then "USER: <image>\n{question} ASSISTANT:". Pictures: padded to a
square in the mean colour (`image_aspect_ratio: pad`), then the tower's own preprocessing.

Source: LLaVA, `model/language_model/llava_llama.py`, `model/llava_arch.py`, `conversation.py`
(`conv_vicuna_v1`), `mm_utils.py` (`process_images`). `model_type` is "llava" in the published
checkpoints and "llava_llama" in later code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmlens.checkpoints.llava_code import (
    multimodal_config,
    named_tower,
    read_config,
    sequential_names,
    tower_part,
)
from mmlens.checkpoints.names import Table, decoder_names, tower_names
from mmlens.checkpoints.towers import Tower, unused
from mmlens.config import MultimodalConfig

TOWER = "model.vision_tower.vision_tower.vision_model."
IGNORED = (
    *unused(r"model\.vision_tower\.vision_tower\.vision_model\."),
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"lm_head\.weight",  # a copy of tied embeddings
)
vision_tower = named_tower


def recognises(config: dict[str, Any]) -> bool:
    """Whether LLaVA's code, with a Llama, has written this."""
    architectures = config.get("architectures") or []
    return "LlavaLlamaForCausalLM" in architectures or config.get("model_type") == "llava_llama"


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """The configuration in our terms.

    Raises:
        CheckpointError: a tower, projector or treatment of pictures that is not supported.
    """
    llava = read_config(folder)
    return multimodal_config(
        folder,
        llava,
        decoder="llama",
        vision=tower_part(llava, tower or named_tower(folder, None)),
        projector=llava.get("mm_projector_type", "linear"),
        original_architecture="LlavaLlamaForCausalLM",
    )


def rename(name: str) -> str:
    """Names are as they should be."""
    return name


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    assert cfg.vision is not None and cfg.projector is not None
    return (
        decoder_names(cfg)
        | tower_names(cfg.vision, TOWER)
        | sequential_names(cfg.projector, "model.mm_projector")
    )
