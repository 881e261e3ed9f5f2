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

from pathlib import Path
from typing import Any

from mmlens.checkpoints.llava_code import (
    multimodal_config,
    named_tower,
    read_config,
    sequential_names,
    tower_part,
)
from mmlens.checkpoints.names import Slot, Table, norm_names, tower_names, weight_and_bias
from mmlens.checkpoints.towers import Tower, unused
from mmlens.config import MultimodalConfig

TOWER = "transformer.vision_tower.vision_tower.vision_model."
IGNORED = (
    *unused(r"transformer\.vision_tower\.vision_tower\.vision_model\."),
    r"transformer\.h\.\d+\.mixer\.rotary_emb\.(inv_freq|scale)",
)
END_OF_TEXT = 50256
vision_tower = named_tower


def recognises(config: dict[str, Any]) -> bool:
    """Whether this is a LLaVA with Phi-2 in its first layout."""
    architectures = config.get("architectures") or []
    is_llava = "LlavaPhiForCausalLM" in architectures or "mm_vision_tower" in config
    return is_llava and "n_embd" in config and "rotary_dim" in config


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """The configuration in our terms.

    Raises:
        CheckpointError: a tower, projector or treatment of pictures that is not supported.
    """
    llava = read_config(folder)
    return multimodal_config(
        folder,
        phi_config(llava) | {"mm_use_im_start_end": llava.get("mm_use_im_start_end")},
        decoder="phi",
        vision=tower_part(llava, tower or named_tower(folder, None)),
        projector=llava.get("mm_projector_type", "linear"),
        original_architecture="LlavaPhiForCausalLM",
    )


def phi_config(first: dict[str, Any]) -> dict[str, Any]:
    """The fields of Phi-2's first config.json under transformers' names."""
    width, heads = first["n_embd"], first["n_head"]
    d_head = width // heads
    return {
        "vocab_size": first["vocab_size"],
        "hidden_size": width,
        "intermediate_size": first.get("n_inner") or 4 * width,
        "num_hidden_layers": first["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": first.get("n_head_kv") or heads,
        "hidden_act": first.get("activation_function", "gelu_new"),
        "layer_norm_eps": first.get("layer_norm_epsilon", 1e-5),
        "max_position_embeddings": first["n_positions"],
        # Half a dimension more, for their product is rounded down.
        "partial_rotary_factor": min(1.0, (first["rotary_dim"] + 0.5) / d_head),
        "tie_word_embeddings": first.get("tie_word_embeddings", False),
        "bos_token_id": first.get("bos_token_id", END_OF_TEXT),
        "eos_token_id": first.get("eos_token_id", END_OF_TEXT),
        "pad_token_id": first.get("pad_token_id"),
    }


def rename(name: str) -> str:
    """Names are as they should be."""
    return name


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    assert cfg.vision is not None and cfg.projector is not None
    decoder = {"transformer.embd.wte.weight": Slot("embed.W_E")}
    for layer in range(cfg.n_layers):
        there, here = f"transformer.h.{layer}", f"blocks.{layer}"
        decoder |= norm_names(f"{there}.ln", f"{here}.ln1", bias=True)
        decoder |= weight_and_bias(f"{there}.mixer.Wqkv", f"{here}.attn.qkv")
        decoder |= weight_and_bias(f"{there}.mixer.out_proj", f"{here}.attn.o")
        decoder |= weight_and_bias(f"{there}.mlp.fc1", f"{here}.mlp.up")
        decoder |= weight_and_bias(f"{there}.mlp.fc2", f"{here}.mlp.down")
    decoder |= norm_names("lm_head.ln", "ln_final", bias=True)
    decoder |= weight_and_bias("lm_head.linear", "unembed")
    return (
        decoder
        | tower_names(cfg.vision, TOWER)
        | sequential_names(cfg.projector, "transformer.mm_projector")
    )
