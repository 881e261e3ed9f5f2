"""Hugging Face configurations, translated: the decoders and towers that several formats share.

Source: transformers, `configuration_*.py` and `modeling_*.py` of llama, mistral, qwen2, phi, clip
and siglip.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.errors import CheckpointError
from mmlens.config import VisionConfig

DECODERS = ("llama", "mistral", "qwen2", "phi")
TOWERS = ("clip_vision_model", "siglip_vision_model")


def decoder_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """`MultimodalConfig` fields of a transformers configuration of one of `DECODERS`.

    Raises:
        CheckpointError: another kind of decoder, or a choice that is not built here.
    """
    if config.model_type not in DECODERS:
        raise CheckpointError(
            f"a {config.model_type!r} decoder; supported are {', '.join(DECODERS)}"
        )
    eos = config.eos_token_id
    head_dim = getattr(config, "head_dim", None)
    fields = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_head": head_dim or config.hidden_size // config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,) * (eos is not None),
        "pad_token_id": config.pad_token_id,
    }
    return fields | (phi_choices(config) if config.model_type == "phi" else llama_choices(config))


def llama_choices(config: PreTrainedConfig) -> dict[str, Any]:
    """What Llama, Mistral and Qwen2 have in common, and where they differ: biases and windows."""
    biased = getattr(config, "attention_bias", False)
    types: Any = None
    if getattr(config, "sliding_window", None):
        # Mistral has no list of layers: all of them have the window.
        listed = getattr(config, "layer_types", None) or ["sliding_attention"] * (
            config.num_hidden_layers
        )
        types = tuple("local" if kind == "sliding_attention" else "global" for kind in listed)
    return {
        "normalization_type": "RMS",
        "eps": config.rms_norm_eps,
        "gated_mlp": True,
        "qkv_bias": biased or config.model_type == "qwen2",
        "o_bias": biased,
        "mlp_bias": getattr(config, "mlp_bias", False),
        "window_size": config.sliding_window if types else None,
        "attn_types": types,
    }


def phi_choices(config: PreTrainedConfig) -> dict[str, Any]:
    """Phi-1, 1.5 and 2: parallel blocks, LayerNorm, biases everywhere, partial rotary."""
    if config.qk_layernorm:
        raise CheckpointError("a Phi decoder with qk_layernorm=True, which is not supported")
    return {
        "normalization_type": "LN",
        "eps": config.layer_norm_eps,
        "parallel_attn_mlp": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "unembed_bias": True,
    }


def vision_config(
    config: PreTrainedConfig, feature_layer: int | Sequence[int], select: Any
) -> VisionConfig:
    """A transformers CLIP or SigLIP vision configuration, and what LLaVA takes of the tower.

    Args:
        feature_layer: index into transformers' `hidden_states`: 0 is the input of the first block,
            -1 the output of the last, -2 of the one before. A list is concatenated.
        select: "default" drops the first position (CLIP's class token), "full" keeps all.

    Raises:
        CheckpointError: another kind of tower, or a layer or a `select` that is not there.
    """
    if config.model_type not in TOWERS:
        raise CheckpointError(f"a {config.model_type!r} tower; supported are {', '.join(TOWERS)}")
    is_clip = config.model_type == "clip_vision_model"
    layers = feature_layers(config.num_hidden_layers, feature_layer, select)
    size = config.image_size
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
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_size=config.patch_size,
        patch_bias=not is_clip,
        class_token=is_clip,
        pre_norm=is_clip,
        n_channels=config.num_channels,
        feature_layers=layers,
        select=select,
    )


def feature_layers(
    n_layers: int, feature_layer: int | Sequence[int], select: Any
) -> tuple[int, ...]:
    """The layers of a tower whose features are taken, counted from the front.

    Raises:
        CheckpointError: a layer or a `select` that is not there.
    """
    if select not in ("default", "full"):
        raise CheckpointError(
            f"vision_feature_select_strategy is {select!r}; it can be 'full', or 'default', which "
            "drops the first position"
        )
    wanted = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    if not wanted or not all(-n_layers - 1 <= layer <= n_layers for layer in wanted):
        raise CheckpointError(
            f"vision_feature_layer is {feature_layer}, but a tower of {n_layers} layers has "
            f"features 0 ... {n_layers} (or -{n_layers + 1} ... -1)"
        )
    return tuple(layer + n_layers + 1 if layer < 0 else layer for layer in wanted)


def generation_ends(folder: Path, default: tuple[int, ...]) -> tuple[int, ...]:
    """End tokens of generation_config.json, which may be more than config.json's one."""
    path = folder / "generation_config.json"
    ends = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    if ends is None:
        return default
    return tuple(ends) if isinstance(ends, list) else (ends,)
