"""Qwen3-VL: `Qwen3VLForConditionalGeneration` (Qwen/Qwen3-VL-2B-Instruct, -4B, -8B, -32B).

Decoder: Qwen3, with interleaved M-RoPE; what several layers of the tower see is added in its first
blocks ("deepstack", Meng et al. 2024). Tower: LayerNorm, a plain MLP, learnt positions brought to
the image's grid, and 2-D rotary ones. The rest is that of `qwen_vl.py`. Mixtures of experts
(`qwen3_vl_moe`) are refused. Source: transformers, `models/qwen3_vl`.
"""

from __future__ import annotations

from mmlens.checkpoints.formats.qwen_vl import qwen_format
from mmlens.checkpoints.towers.qwen_vl import qwen3_tower

FORMAT = qwen_format(
    "Qwen3-VL",
    "qwen3_vl",
    "Qwen3VLForConditionalGeneration",
    qwen3_tower,
)
