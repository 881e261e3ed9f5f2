"""Qwen2.5-VL: `Qwen2_5_VLForConditionalGeneration` (Qwen/Qwen2.5-VL-3B-Instruct, -7B, -32B, -72B).

Decoder: Qwen2. Tower: RMSNorm, a gated MLP, 2-D rotary positions; most layers attend inside of
windows. The rest is that of `qwen_vl.py`. Source: transformers, `models/qwen2_5_vl`.
"""

from __future__ import annotations

from mmlens.checkpoints.formats.qwen_vl import qwen_format
from mmlens.checkpoints.towers.qwen_vl import QWEN2_5_TOWER

FORMAT = qwen_format(
    "Qwen2.5-VL",
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    lambda cfg: QWEN2_5_TOWER,
)
