"""Granite 3 (dense): Llama with a factor on embeddings, on what blocks add, on scores and logits.

Source: transformers, `configuration_granite.py` and `modeling_granite.py` of granite.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.decoders import llama
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Decoder

FACTORS = (
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)


def choices(config: PreTrainedConfig) -> dict[str, Any]:
    """Return Llama's choices and the factors.

    Raises:
        CheckpointError: a factor that is not above 0.
    """
    for name in FACTORS:
        if not getattr(config, name) > 0:
            raise CheckpointError(f"{name} is {getattr(config, name)}; it must be above 0")
    return llama.choices(config) | {
        "embed_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attn_scale": 1.0 / config.attention_multiplier,
        "logits_scale": 1.0 / config.logits_scaling,
    }


GRANITE = Decoder(llama.NAMES, choices)
