"""GPT-NeoX (Pythia): parallel blocks with a norm for each part, biases, partial rotary positions.

Source: transformers, `configuration_gpt_neox.py` and `modeling_gpt_neox.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.format import Decoder

NAMES = {
    "embed_in.weight": "embed.W_E",
    "layers.{}.input_layernorm": "blocks.{}.ln1",
    "layers.{}.attention.query_key_value": "blocks.{}.attn.qkv[by head]",
    "layers.{}.attention.dense": "blocks.{}.attn.o",
    "layers.{}.post_attention_layernorm": "blocks.{}.ln2",
    "layers.{}.mlp.dense_h_to_4h": "blocks.{}.mlp.up",
    "layers.{}.mlp.dense_4h_to_h": "blocks.{}.mlp.down",
    "final_layer_norm": "ln_final",
}


def choices(config: PreTrainedConfig) -> dict[str, Any]:
    """Return GPT-NeoX's choices."""
    return {
        "normalization_type": "LN",
        "eps": config.layer_norm_eps,
        "parallel_attn_mlp": config.use_parallel_residual,
        "parallel_ln2": config.use_parallel_residual,
        "n_key_value_heads": None,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
        "mlp_bias": True,
    }


GPT_NEOX = Decoder(NAMES, choices, prefix="gpt_neox.", partial_rotary=True)
