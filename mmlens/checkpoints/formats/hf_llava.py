r"""Hugging Face LLaVA: `LlavaForConditionalGeneration` (llava-hf/llava-1.5-7b-hf and its like).

Decoder: Llama, Mistral (bakLlava), Qwen2 or Phi. Tower: CLIP or SigLIP. Projector: linear_1,
activation, linear_2.

Prompt: the checkpoint's own chat template ("USER: <image>\n{question} ASSISTANT:" for LLaVA 1.5).
Images: the checkpoint's own image processor.

Names: transformers has written this format in three layouts over time (`language_model.model.*`;
`model.language_model.*` with `lm_head` at the top; and the tower with or without `vision_model.`).
All are brought to the first. Source: transformers, `models/llava/modeling_llava.py` and the "llava"
entry of `conversion_mapping.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mmlens.checkpoints.decoders import (
    decoder_fields_in,
    inner_names,
    visual_scale,
    without_its_head,
)
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.hf_configs import known_activation, vision_config
from mmlens.checkpoints.names import HF_PROJECTOR, TOWER, under
from mmlens.checkpoints.towers.named_towers import Tower, unused
from mmlens.checkpoints.weight_files import has_tensor
from mmlens.config import AnyResConfig, MultimodalConfig, ProjectorConfig, VisionConfig

IGNORED = (
    *unused(r"vision_tower\."),
    r".*\.position_ids",
    r".*\.rotary_emb\.inv_freq",
    r"language_model\.lm_head\.weight",  # a copy of tied embeddings
)


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a `LlavaForConditionalGeneration`."""
    return config.get("model_type") == "llava" and "vision_config" in config


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms; see `model_config`."""
    return model_config(folder, "LlavaForConditionalGeneration")


def model_config(
    folder: Path,
    architecture: str,
    tiles: Callable[[PreTrainedConfig, VisionConfig], AnyResConfig] | None = None,
) -> MultimodalConfig:
    """Return the configuration of a LLaVA that transformers has written, in our terms.

    Args:
        folder: of the checkpoint.
        architecture: the class that has written it.
        tiles: how its images are cut into tiles; None where they are not.

    Raises:
        CheckpointError: a decoder or a tower that is not among the supported ones.
    """
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, vision = hf.text_config, hf.vision_config
    taken = vision_config(vision, hf.vision_feature_layer, hf.vision_feature_select_strategy)
    fields = without_its_head(decoder_fields_in(folder, text, hf))
    projector = ProjectorConfig(
        d_in=vision.hidden_size * len(taken.feature_layers),
        d_hidden=text.hidden_size,
        d_out=text.hidden_size,
        act_fn=known_activation(hf.projector_hidden_act, "projector_hidden_act"),
        bias=hf.multimodal_projector_bias,
        anyres=None if tiles is None else tiles(hf, taken),
        out_scale=visual_scale(fields),
    )
    # Phi's output layer has a bias; transformers' LLaVA kept it in its first two layouts only.
    fields["unembed_bias"] = fields.get("unembed_bias", False) and has_tensor(
        folder, r"(language_model\.)?lm_head\.bias"
    )
    return MultimodalConfig(
        **fields,
        image_token_id=hf.image_token_index,
        image_layout="one_grid" if tiles is None else "anyres",
        vision=taken,
        projector=projector,
        original_architecture=architecture,
    )


def rename(name: str) -> str:
    """Return a tensor's name in the oldest layout."""
    parts = "vision_tower|multi_modal_projector|language_model|image_newline"
    name = re.sub(rf"^model\.(?={parts})", "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)


def names(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the name table: the decoder's, the tower's and the projector's."""
    return inner_names(cfg) | under("vision_tower.", TOWER) | HF_PROJECTOR


FORMAT = Format("Hugging Face LLaVA", recognises, config, names, ignored=IGNORED, rename=rename)
