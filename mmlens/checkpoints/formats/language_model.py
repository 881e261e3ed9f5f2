"""A language model alone, as transformers writes it: one of `checkpoints.decoders`
(`LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `PhiForCausalLM`,
`GPTNeoXForCausalLM`, `GemmaForCausalLM`, `Gemma2ForCausalLM`, `Gemma3ForCausalLM`).

The paper's comparison: the same class, with `model.vision is None`.

Prompt: the tokenizer's chat template, if it has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.decoders import DECODERS, decoder_fields_in, decoder_names
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import MultimodalConfig


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a decoder without a tower."""
    return config.get("model_type") in DECODERS and not any("vision" in key for key in config)


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms."""
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = (hf.architectures or [""])[0]
    return MultimodalConfig(**decoder_fields_in(folder, hf), original_architecture=architecture)


FORMAT = Format(
    "language model",
    recognises,
    config,
    decoder_names,
    ignored=(
        r".*\.rotary_emb\.inv_freq",
        r"gpt_neox\..*\.attention\.(masked_)?bias",  # the causal mask
        r"lm_head\.weight",  # where it is tied
    ),
    rename=lambda name: re.sub(r"^embed_out\.", "lm_head.", name),  # GPT-NeoX's
)
