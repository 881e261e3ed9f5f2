"""The decoders of Qwen2-VL, Qwen2.5-VL (both Qwen2's) and Qwen3-VL (Qwen3's), with M-RoPE.

Positions have three axes; see `mmlens.inputs.rope_positions`. Source: transformers,
`configuration_*.py` and `modeling_*.py` in `models/qwen2_vl`, `models/qwen2_5_vl` and
`models/qwen3_vl`, whose classes say how sections lie: their field `mrope_interleaved` says nothing.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.decoders.llama import LLAMA
from mmlens.checkpoints.format import Decoder

SECTIONS = {"qwen3_vl_text": (24, 20, 20)}
"""Pairs of each axis where a configuration does not say it; the others have (16, 24, 24)."""


def choices(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the choices of Qwen2 or Qwen3, and how pairs are rotated."""
    rope = dict(config.rope_parameters)
    rope["mrope_section"] = list(
        rope.get("mrope_section") or SECTIONS.get(config.model_type, (16, 24, 24))
    )
    rope["mrope_interleaved"] = config.model_type == "qwen3_vl_text"
    return LLAMA.choices(config) | {"rope_parameters": rope}


QWEN_VL = Decoder(LLAMA.names, choices)
