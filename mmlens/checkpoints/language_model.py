"""A language model alone, as transformers writes it: Llama (Vicuna, SmolLM2 ...), Mistral, Qwen2,
Phi (`LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `PhiForCausalLM`).

The paper's comparison: the same class, with `model.vision is None`.

Prompt: the tokenizer's chat template, if it has one. Source: transformers, `modeling_llama.py`,
`modeling_mistral.py`, `modeling_qwen2.py` and `modeling_phi.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.hf_configs import DECODERS, decoder_fields, generation_ends
from mmlens.checkpoints.names import Table, decoder_names
from mmlens.config import MultimodalConfig

IGNORED = (r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")  # the latter where it is tied


def recognises(config: dict[str, Any]) -> bool:
    """Whether this is a decoder without a tower."""
    return config.get("model_type") in DECODERS and not any("vision" in key for key in config)


def config(folder: Path) -> MultimodalConfig:
    """The configuration in our terms."""
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    fields = decoder_fields(hf)
    fields["eos_token_ids"] = generation_ends(folder, fields["eos_token_ids"])
    return MultimodalConfig(**fields, original_architecture=(hf.architectures or [""])[0])


def rename(name: str) -> str:
    """Names are as they should be."""
    return name


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    return decoder_names(cfg)
