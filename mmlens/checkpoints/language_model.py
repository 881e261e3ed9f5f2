"""A language model alone: Hugging Face's `LlamaForCausalLM` (Llama, Vicuna, SmolLM2 ...).

The paper's comparison: the same class, with `model.vision is None`.

Prompt: the tokenizer's chat template, if it has one. Source: transformers,
`models/llama/modeling_llama.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.hf_configs import generation_ends, llama_fields
from mmlens.checkpoints.names import Table, llama_names
from mmlens.config import MultimodalConfig

IGNORED = (r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")  # the latter where it is tied


def recognises(config: dict[str, Any]) -> bool:
    """Whether this is a Llama without a tower."""
    return config.get("model_type") == "llama" and not any("vision" in key for key in config)


def config(folder: Path) -> MultimodalConfig:
    """The configuration in our terms."""
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    fields = llama_fields(hf)
    fields["eos_token_ids"] = generation_ends(folder, fields["eos_token_ids"])
    return MultimodalConfig(
        **fields,
        tie_word_embeddings=hf.tie_word_embeddings,
        original_architecture="LlamaForCausalLM",
    )


def rename(name: str) -> str:
    """Names are as they should be."""
    return name


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    return llama_names(cfg)
