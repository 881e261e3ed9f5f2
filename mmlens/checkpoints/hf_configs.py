"""Hugging Face configurations, translated: the parts that several formats share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mmlens.config import VisionConfig


def llama_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """`MultimodalConfig` fields of a transformers `LlamaConfig`."""
    eos = config.eos_token_id
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_head": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "eps": config.rms_norm_eps,
        "gated_mlp": True,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,) * (eos is not None),
        "pad_token_id": config.pad_token_id,
    }


def clip_vision_config(
    config: PreTrainedConfig, feature_layer: int | Sequence[int], select: Any
) -> VisionConfig:
    """A transformers `CLIPVisionConfig` and what LLaVA takes of the tower.

    `feature_layer` indexes transformers' `hidden_states`: 0 is the input of the first block,
    -1 the output of the last, -2 of the one before. A list is concatenated.
    """
    wanted = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    layers = tuple(layer + config.num_hidden_layers + 1 if layer < 0 else layer for layer in wanted)
    return VisionConfig(
        n_layers=max(layers),
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        act_fn=config.hidden_act,
        normalization_type="LN",
        eps=config.layer_norm_eps,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        image_size=(config.image_size, config.image_size),
        patch_size=config.patch_size,
        n_channels=config.num_channels,
        feature_layers=layers,
        select=select,
    )


def generation_ends(folder: Path, default: tuple[int, ...]) -> tuple[int, ...]:
    """End tokens of generation_config.json, which may be more than config.json's one."""
    path = folder / "generation_config.json"
    ends = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    if ends is None:
        return default
    return tuple(ends) if isinstance(ends, list) else (ends,)
