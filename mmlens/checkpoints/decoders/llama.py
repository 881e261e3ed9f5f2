"""Llama (Vicuna, SmolLM2 ...), Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, gated MLPs.

Source: transformers, `configuration_*.py` and `modeling_*.py` of llama, mistral,
qwen2 and qwen3.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.decoders.layer_types import attn_types
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Decoder

NAMES = {
    "embed_tokens.weight": "embed.W_E",
    "layers.{}.input_layernorm": "blocks.{}.ln1",
    "layers.{}.self_attn.q_proj": "blocks.{}.attn.qkv[q]",
    "layers.{}.self_attn.k_proj": "blocks.{}.attn.qkv[k]",
    "layers.{}.self_attn.v_proj": "blocks.{}.attn.qkv[v]",
    "layers.{}.self_attn.q_norm": "blocks.{}.attn.q_norm",  # Qwen3's
    "layers.{}.self_attn.k_norm": "blocks.{}.attn.k_norm",
    "layers.{}.self_attn.o_proj": "blocks.{}.attn.o",
    "layers.{}.post_attention_layernorm": "blocks.{}.ln2",
    "layers.{}.mlp.gate_proj": "blocks.{}.mlp.gate",
    "layers.{}.mlp.up_proj": "blocks.{}.mlp.up",
    "layers.{}.mlp.down_proj": "blocks.{}.mlp.down",
    "norm": "ln_final",
}


WINDOWED = {"mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text"}
"""Whose windows transformers applies: the others may have the fields, which say nothing there."""
BIASED = {"llama", "granite", "qwen3", "qwen3_vl_text"}
"""Whose `attention_bias` counts, in the same way."""
MLP_BIASED = {"llama", "granite"}
"""Whose `mlp_bias` does."""


def choices(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what they have in common, and where they differ: biases, windows, norms of queries.

    Raises:
        CheckpointError: layers that have a window, and no window.
    """
    biased = config.model_type in BIASED and config.attention_bias
    types = windows(config) if config.model_type in WINDOWED else None
    return {
        "normalization_type": "RMS",
        "eps": config.rms_norm_eps,
        "gated_mlp": True,
        "qkv_bias": biased or config.model_type.startswith("qwen2"),
        "o_bias": biased,
        "qk_norm": config.model_type.startswith("qwen3"),
        "mlp_bias": config.model_type in MLP_BIASED and config.mlp_bias,
        "window_size": config.sliding_window if types else None,
        "attn_types": types,
    }


def windows(config: PreTrainedConfig) -> Any:
    """Return which layers have a window; None where none has.

    Raises:
        CheckpointError: layers that have a window, and no window.
    """
    listed = getattr(config, "layer_types", None)
    if getattr(config, "sliding_window", None):
        # Mistral has no list of layers: all of them have the window.
        return attn_types(listed or ["sliding_attention"] * config.num_hidden_layers)
    if "sliding_attention" in (listed or ()):
        raise CheckpointError(
            "layer_types has sliding_attention, but there is no sliding_window (in Qwen2 it "
            "needs use_sliding_window as well)"
        )
    return None


LLAMA = Decoder(NAMES, choices)
