"""Phi-1, 1.5 and 2: parallel blocks, LayerNorm, biases everywhere, partial rotary positions.

Source: transformers, `configuration_phi.py` and `modeling_phi.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Decoder

NAMES = {
    "embed_tokens.weight": "embed.W_E",
    "layers.{}.input_layernorm": "blocks.{}.ln1",
    "layers.{}.self_attn.q_proj": "blocks.{}.attn.qkv[q]",
    "layers.{}.self_attn.k_proj": "blocks.{}.attn.qkv[k]",
    "layers.{}.self_attn.v_proj": "blocks.{}.attn.qkv[v]",
    "layers.{}.self_attn.dense": "blocks.{}.attn.o",
    "layers.{}.mlp.fc1": "blocks.{}.mlp.up",
    "layers.{}.mlp.fc2": "blocks.{}.mlp.down",
    "final_layernorm": "ln_final",
}


def choices(config: PreTrainedConfig) -> dict[str, Any]:
    """Return Phi's choices."""
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


PHI = Decoder(NAMES, choices, partial_rotary=True)
