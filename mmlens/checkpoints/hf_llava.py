r"""Hugging Face LLaVA: `LlavaForConditionalGeneration` (llava-hf/llava-1.5-7b-hf and its like).

Decoder: Llama, Mistral (bakLlava), Qwen2 or Phi. Tower: CLIP or SigLIP. Projector: linear_1,
activation, linear_2.

Prompt: the checkpoint's own chat template ("USER: <image>\n{question} ASSISTANT:" for LLaVA 1.5).
Pictures: the checkpoint's own image processor.

Names: transformers has written this format in three layouts over time (`language_model.model.*`;
`model.language_model.*` with `lm_head` at the top; and the tower with or without `vision_model.`).
All are brought to the first. Source: transformers, `models/llava/modeling_llava.py` and the "llava"
entry of `conversion_mapping.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.hf_configs import decoder_fields, generation_ends, vision_config
from mmlens.checkpoints.names import Table, decoder_names, projector_names, tower_names
from mmlens.checkpoints.weight_files import has_tensor
from mmlens.config import MultimodalConfig, ProjectorConfig

# Blocks of the tower behind the feature layer and its last norm are in the checkpoint, unused.
IGNORED = (
    r"vision_tower\.encoder\.layers\.\d+\.(layer_norm\d|self_attn\.\w+_proj|mlp\.fc\d)\.(weight|bias)",
    r"vision_tower\.post_layernorm\..*",
    r"vision_tower\.head\..*",  # SigLIP's pooling
    r".*\.position_ids",
    r".*\.rotary_emb\.inv_freq",
    r"language_model\.lm_head\.weight",  # a copy of tied embeddings
)


def recognises(config: dict[str, Any]) -> bool:
    """Whether this is a `LlavaForConditionalGeneration`."""
    return config.get("model_type") == "llava" and "vision_config" in config


def config(folder: Path) -> MultimodalConfig:
    """The configuration in our terms.

    Raises:
        CheckpointError: a decoder or a tower that is not among the supported ones.
    """
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, vision = hf.text_config, hf.vision_config
    tower = vision_config(vision, hf.vision_feature_layer, hf.vision_feature_select_strategy)
    projector = ProjectorConfig(
        d_in=vision.hidden_size * len(tower.feature_layers),
        d_hidden=text.hidden_size,
        d_out=text.hidden_size,
        act_fn=hf.projector_hidden_act,
        bias=hf.multimodal_projector_bias,
    )
    fields = decoder_fields(text) | {"tie_word_embeddings": hf.tie_word_embeddings}
    fields["eos_token_ids"] = generation_ends(folder, fields["eos_token_ids"])
    # Phi's output layer has a bias; transformers' LLaVA kept it in its first two layouts only.
    fields["unembed_bias"] = fields.get("unembed_bias", False) and has_tensor(
        folder, r"(language_model\.)?lm_head\.bias"
    )
    return MultimodalConfig(
        **fields,
        image_token_id=hf.image_token_index,
        vision=tower,
        projector=projector,
        original_architecture="LlavaForConditionalGeneration",
    )


def rename(name: str) -> str:
    """A tensor's name in the oldest layout."""
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector|language_model)", "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    assert cfg.vision is not None and cfg.projector is not None
    return (
        decoder_names(cfg, "language_model.model.", "language_model.lm_head")
        | tower_names(cfg.vision, "vision_tower.")
        | projector_names(cfg.projector, prefix="multi_modal_projector.")
    )
