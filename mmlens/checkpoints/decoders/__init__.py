"""The language models that mmlens reads, one file a family, whichever format they come in.

To add one, write a file like `llama.py` and give it a row in `DECODERS`, under transformers'
`model_type`; outside of the package, `DECODERS["name"] = Decoder(...)` does the same. The formats
of a language model alone, of Hugging Face's LLaVA, of TinyLLaVA and of GGUF files then know it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.decoders.gemma import GEMMA, GEMMA_2, GEMMA_3
from mmlens.checkpoints.decoders.gpt_neox import GPT_NEOX
from mmlens.checkpoints.decoders.granite import GRANITE
from mmlens.checkpoints.decoders.llama import LLAMA
from mmlens.checkpoints.decoders.phi import PHI
from mmlens.checkpoints.decoders.qwen_vl import QWEN_VL
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Decoder
from mmlens.checkpoints.hf_configs import generation_ends, known_activation
from mmlens.checkpoints.names import under
from mmlens.config import MultimodalConfig

__all__ = [
    "DECODERS",
    "Decoder",
    "decoder_fields",
    "decoder_fields_in",
    "decoder_names",
    "inner_names",
]

DECODERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "phi": PHI,
    "gpt_neox": GPT_NEOX,
    "gemma": GEMMA,
    "gemma2": GEMMA_2,
    "gemma3_text": GEMMA_3,
    "granite": GRANITE,
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), QWEN_VL),
}


def decoder_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return `MultimodalConfig` fields of a transformers configuration of one of `DECODERS`."""
    if config.model_type not in DECODERS:
        raise CheckpointError(
            f"a {config.model_type!r} decoder; supported are {', '.join(DECODERS)}"
        )
    decoder, eos = DECODERS[config.model_type], getattr(config, "eos_token_id", None)
    head_dim = getattr(config, "head_dim", None)
    return {
        "decoder_type": config.model_type,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": getattr(config, "num_key_value_heads", None),
        "d_head": head_dim or config.hidden_size // config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "act_fn": known_activation(
            getattr(config, decoder.activation), f"{decoder.activation} of the decoder"
        ),
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "tie_word_embeddings": getattr(config, "tie_word_embeddings", False),
        "bos_token_id": getattr(config, "bos_token_id", None),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,) * (eos is not None),
        "pad_token_id": config.pad_token_id,
    } | decoder.choices(config)


def decoder_fields_in(
    folder: Path, decoder: PreTrainedConfig, whole: PreTrainedConfig | None = None
) -> dict[str, Any]:
    """Return `decoder_fields`, and what other files and fields of a checkpoint say of them.

    Args:
        folder: of the checkpoint; its generation_config.json may name more end tokens.
        decoder: transformers' configuration of the decoder.
        whole: that of a model with images, which then says whether embeddings are tied.
    """
    fields = decoder_fields(decoder)
    if whole is not None:
        fields["tie_word_embeddings"] = whole.tie_word_embeddings
    return fields | {"eos_token_ids": generation_ends(folder, fields["eos_token_ids"])}


def decoder_names(cfg: MultimodalConfig, outer: str = "") -> dict[str, str]:
    """Return the name table of a configuration's decoder, whose names begin with `outer`."""
    decoder = DECODERS[cfg.decoder_type]
    return inner_names(cfg, outer + decoder.prefix, outer + decoder.head)


def inner_names(
    cfg: MultimodalConfig,
    base: str = "language_model.model.",
    head: str = "language_model.lm_head",
) -> dict[str, str]:
    """Return the name table of a decoder inside of a model with images.

    Args:
        cfg: of the whole model.
        base: stands before the names of the decoder's base model.
        head: the output layer.
    """
    return under(base, DECODERS[cfg.decoder_type].names) | {head: "unembed"}
