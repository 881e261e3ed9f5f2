"""Qwen2-VL: `Qwen2VLForConditionalGeneration` (Qwen/Qwen2-VL-2B-Instruct, -7B, -72B).

Decoder: Qwen2. Tower: LayerNorm, a plain MLP, 2-D rotary positions. The rest is that of
`qwen_vl.py`. Source: transformers, `models/qwen2_vl`.
"""

from __future__ import annotations

from mmlens.checkpoints.formats.qwen_vl import qwen_format
from mmlens.checkpoints.towers.qwen_vl import QWEN2_TOWER

FORMAT = qwen_format(
    "Qwen2-VL",
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    lambda cfg: QWEN2_TOWER,
)
