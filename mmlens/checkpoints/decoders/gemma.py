"""Gemma 1, 2 and 3: norms around 1, scaled embeddings, gated MLPs.

Gemma 2 and 3 also normalise what attention and MLP give, and have windows in some layers; Gemma 2
caps scores and logits, Gemma 3 normalises queries and keys and has other rotary angles in layers
with windows. Source: transformers, `configuration_*.py` and `modeling_*.py` of gemma, gemma2 and
gemma3.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.decoders.layer_types import attn_types
from mmlens.checkpoints.decoders.llama import NAMES as LLAMA_NAMES
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Decoder

SANDWICH = LLAMA_NAMES | {
    "layers.{}.post_attention_layernorm": "blocks.{}.ln1_post",
    "layers.{}.pre_feedforward_layernorm": "blocks.{}.ln2",
    "layers.{}.post_feedforward_layernorm": "blocks.{}.ln2_post",
}


def gemma(config: PreTrainedConfig) -> dict[str, Any]:
    """Return Gemma's choices."""
    if config.use_bidirectional_attention:
        raise CheckpointError(
            f"a {config.model_type!r} decoder with use_bidirectional_attention=True: that is an "
            "encoder of texts, and mmlens reads models that predict the next token"
        )
    return common(config)


def common(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what all have in common."""
    return {
        "normalization_type": "RMS",
        "eps": config.rms_norm_eps,
        "norm_offset": 1.0,
        "embed_scale": config.hidden_size**0.5,
        "gated_mlp": True,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
    }


def gemma_2(config: PreTrainedConfig) -> dict[str, Any]:
    """Return Gemma 2's choices."""
    return gemma(config) | sandwich(config) | caps(config)


def sandwich(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what Gemma 2 and 3 have in common beyond Gemma."""
    types = attn_types(config.layer_types)
    if "local" in types and not config.sliding_window:
        raise CheckpointError("layer_types has sliding_attention, but there is no sliding_window")
    if not config.query_pre_attn_scalar > 0:
        raise CheckpointError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}; it must be above 0"
        )
    return {
        "post_norms": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_types": types,
        "window_size": config.sliding_window if "local" in types else None,
    }


def caps(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what scores and logits are capped at."""
    return {
        "scores_softcap": config.attn_logit_softcapping,
        "logits_softcap": config.final_logit_softcapping,
    }


def gemma_3(config: PreTrainedConfig) -> dict[str, Any]:
    """Return Gemma 3's choices."""
    if config.attn_logit_softcapping is not None:
        raise CheckpointError(
            f"a Gemma 3 with attn_logit_softcapping={config.attn_logit_softcapping}, which "
            "transformers' own Gemma 3 does not apply: no model is known to have it"
        )
    ropes = config.rope_parameters
    return (
        gemma(config)
        | sandwich(config)
        | caps(config)
        | {
            "qk_norm": True,
            "rope_parameters": dict(ropes["full_attention"]),
            "local_rope_parameters": dict(ropes["sliding_attention"]),
        }
    )


GEMMA = Decoder(LLAMA_NAMES, gemma)
GEMMA_2 = Decoder(SANDWICH, gemma_2, activation="hidden_activation")
GEMMA_3 = Decoder(SANDWICH, gemma_3, activation="hidden_activation")
