r"""LLaVA-Phi around the Phi-2 that Microsoft first published, with its own code ("phi-msft"): fused
queries, keys and values, another config.json, everything under `transformer.`.

Decoder: Phi-2; `n_embd`, `n_layer`, `n_head`, `rotary_dim` ... in config.json. Tower:
`transformer.vision_tower.vision_tower.vision_model.`, or its own checkpoint. Projector:
`transformer.mm_projector`. The rest is as in `llava_phi.py`.

Source: Phi-2's `configuration_phi.py` and `modeling_phi.py` as published with it in December 2023
(still in text-generation-inference, `flash_phi` and `phi_modeling.py`); lmdeploy's fork
RunningLeon/lmdeploy, `video-streaming-proj/config_llava_phi.py` (the prefixes).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats.llava_code import llava_config, named_tower
from mmlens.checkpoints.hf_configs import known_activation
from mmlens.checkpoints.names import TOWER, sequential, under
from mmlens.checkpoints.towers.named_towers import unused
from mmlens.config import MultimodalConfig

END_OF_TEXT = 50256
NAMES = {
    "transformer.embd.wte.weight": "embed.W_E",
    "transformer.h.{}.ln": "blocks.{}.ln1",
    "transformer.h.{}.mixer.Wqkv": "blocks.{}.attn.qkv",
    "transformer.h.{}.mixer.out_proj": "blocks.{}.attn.o",
    "transformer.h.{}.mlp.fc1": "blocks.{}.mlp.up",
    "transformer.h.{}.mlp.fc2": "blocks.{}.mlp.down",
    "lm_head.ln": "ln_final",
    "lm_head.linear": "unembed",
    **under("transformer.vision_tower.vision_tower.vision_model.", TOWER),
}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a LLaVA with Phi-2 in its first layout."""
    architectures = config.get("architectures") or []
    is_llava = "LlavaPhiForCausalLM" in architectures or "mm_vision_tower" in config
    return is_llava and "n_embd" in config and "rotary_dim" in config


def names(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the name table."""
    return NAMES | sequential(cfg.projector, "transformer.mm_projector")


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as LLaVA's code would write it around transformers' Phi."""
    return phi_config(config) | {k: v for k, v in config.items() if k.startswith("mm_")}


def phi_config(first: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Phi-2's first config.json under transformers' names."""
    width, heads = first["n_embd"], first["n_head"]
    d_head = width // heads
    return {
        "vocab_size": first["vocab_size"],
        "hidden_size": width,
        "intermediate_size": first.get("n_inner") or 4 * width,
        "num_hidden_layers": first["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": first.get("n_head_kv") or heads,
        "hidden_act": known_activation(
            first.get("activation_function", "gelu_new"), "activation_function"
        ),
        "layer_norm_eps": first.get("layer_norm_epsilon", 1e-5),
        "max_position_embeddings": first["n_positions"],
        # Half a dimension more, for their product is rounded down.
        "partial_rotary_factor": min(1.0, (first["rotary_dim"] + 0.5) / d_head),
        "tie_word_embeddings": first.get("tie_word_embeddings", False),
        "bos_token_id": first.get("bos_token_id", END_OF_TEXT),
        "eos_token_id": first.get("eos_token_id", END_OF_TEXT),
        "pad_token_id": first.get("pad_token_id"),
    }


FORMAT = Format(
    "LLaVA-Phi, first layout",
    recognises,
    partial(llava_config, architecture="LlavaPhiForCausalLM", decoder="phi", fields=fields),
    names,
    ignored=(
        *unused(r"transformer\.vision_tower\.vision_tower\.vision_model\."),
        r"transformer\.h\.\d+\.mixer\.rotary_emb\.(inv_freq|scale)",
    ),
    tower=named_tower,
)
