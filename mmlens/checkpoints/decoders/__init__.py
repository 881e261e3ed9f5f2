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
    "visual_scale",
    "without_its_head",
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
    check_causal(config)
    # As transformers' models do it: the first time, a field outside of them is not there yet.
    config.standardize_rope_params()
    decoder, head_dim = DECODERS[config.model_type], getattr(config, "head_dim", None)
    fields = {
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
        "eos_token_ids": as_ids(getattr(config, "eos_token_id", None)),
        "pad_token_id": config.pad_token_id,
    } | decoder.choices(config)
    if not decoder.partial_rotary:
        for name in ("rope_parameters", "local_rope_parameters"):
            fields[name] = whole_heads(fields.get(name))
    return fields


def check_causal(config: PreTrainedConfig) -> None:
    """Raise a CheckpointError where `is_causal` is False: transformers then masks nothing."""
    if getattr(config, "is_causal", True) is False:
        raise CheckpointError(
            f"is_causal is False ({config.model_type}), so each token attends to all: that is an "
            "encoder of texts, and mmlens reads models that predict the next token"
        )


def whole_heads(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return rotary parameters without a share of each head, which transformers ignores there.

    Raises:
        CheckpointError: angles of a kind of which transformers would make too few for a head.
    """
    share, kind = (rope or {}).get("partial_rotary_factor"), (rope or {}).get("rope_type")
    if rope is None or share is None:
        return rope
    if share != 1 and kind not in (None, "default"):
        raise CheckpointError(
            f"partial_rotary_factor is {share} with rope_type {kind!r}, but this decoder rotates "
            "whole heads"
        )
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def as_ids(ids: Any) -> tuple[int, ...]:
    """Return token ids of a configuration, which may be one, several or none, as a tuple."""
    return tuple(ids) if isinstance(ids, list) else (ids,) * (ids is not None)


def decoder_fields_in(
    folder: Path, decoder: PreTrainedConfig, whole: PreTrainedConfig | None = None
) -> dict[str, Any]:
    """Return `decoder_fields`, and what other files and fields of a checkpoint say of them.

    Args:
        folder: of the checkpoint; its generation_config.json may name more end tokens.
        decoder: transformers' configuration of the decoder.
        whole: that of a model with images, which then says whether embeddings are tied, and whose
            end tokens come before the decoder's.
    """
    fields = decoder_fields(decoder)
    if whole is not None:
        check_causal(whole)
        fields["tie_word_embeddings"] = whole.tie_word_embeddings
        ends = as_ids(getattr(whole, "eos_token_id", None))
        fields["eos_token_ids"] = ends or fields["eos_token_ids"]
    return fields | {"eos_token_ids": generation_ends(folder, fields["eos_token_ids"])}


def without_its_head(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `decoder_fields` of a decoder under an output layer of the whole model's own.

    transformers' LLaVA, Idefics3 and InternVL cap and scale no logits, whatever the decoder does.
    """
    return fields | {"logits_softcap": None, "logits_scale": 1.0}


def visual_scale(fields: dict[str, Any]) -> float:
    """Return what visual tokens are multiplied by on their way into a decoder with these fields.

    Granite scales whatever comes in, visual tokens too; Gemma its own embeddings alone.
    """
    return fields["embed_scale"] if fields["decoder_type"] == "granite" else 1.0


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
