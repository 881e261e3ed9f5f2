"""Sizes and choices of planted models: any decoder after a LLaVA's tower, or one of Qwen-VL's."""

from __future__ import annotations

import random
from typing import Any

from planted_models import BOS, D_VOCAB, IMAGE, PATCH

from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig

FAMILIES = ("llava", "qwen2", "qwen3")
"""qwen2: Qwen2-VL or Qwen2.5-VL, whose decoders are the same."""
GRIDS = ((2, 2), (2, 3), (3, 2), (1, 4))
SLOW = 1e12
"""A base of rotary angles: the slowest two of four pairs turn so little that, in a prompt of 128
tokens, no score changes by more than its rounding."""


def planted_config(chance: random.Random, family: str = "llava", **choices: Any):
    """The configuration and a grid of visual tokens, random; `choices` fixes decoder fields."""
    n_kv_heads = chance.choice([1, 1, 2, 3])
    grid = chance.choice(GRIDS)
    sizes: dict[str, Any] = {
        "n_layers": chance.randint(3, 6),
        "d_model": chance.choice([40, 47, 56]),
        "n_key_value_heads": n_kv_heads,
        "n_heads": n_kv_heads * chance.choice([1, 2]),
        "d_head": chance.choice([8, 12]),
        "d_mlp": chance.choice([19, 28]),
        "gated_mlp": chance.random() < 0.5,
        "act_fn": chance.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
        "normalization_type": chance.choice(["RMS", "LN"]),
        "parallel_attn_mlp": chance.random() < 0.3,
        "qkv_bias": chance.random() < 0.3,
        "mlp_bias": chance.random() < 0.3,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }
    if family == "llava":
        vision, merger = llava_tower(chance, grid), {}
    else:
        sizes |= qwen_decoder(family, chance, sizes["d_head"])
        vision, merger = qwen_tower(family, chance)
    sizes |= choices
    projector = ProjectorConfig(d_in=vision.d_model, d_hidden=15, d_out=sizes["d_model"], **merger)
    cfg = MultimodalConfig(
        eps=1e-6,
        n_ctx=128,
        d_vocab=D_VOCAB,
        image_token_id=IMAGE,
        image_layout="any_grid" if vision.packed else "one_grid",
        bos_token_id=BOS,
        vision=vision,
        projector=projector,
        **sizes,
    )
    return cfg, grid


def llava_tower(chance: random.Random, grid: tuple[int, int]) -> VisionConfig:
    """CLIP's or SigLIP's kind, for images of one grid."""
    class_token = chance.random() < 0.5
    n_layers = chance.randint(1, 3)
    return VisionConfig(
        n_layers=n_layers,
        d_model=chance.choice([20, 26]),
        d_head=5,
        act_fn="quick_gelu",
        normalization_type="LN",
        image_size=(PATCH * grid[0], PATCH * grid[1]),
        feature_layers=(n_layers,),
        select="default" if class_token and chance.random() < 0.7 else "full",
        class_token=class_token,
        pre_norm=chance.random() < 0.5,
        **COMMON,
    )


COMMON: dict[str, Any] = {
    "n_heads": 2,
    "d_mlp": 17,
    "eps": 1e-5,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "patch_size": PATCH,
}


def qwen_decoder(family: str, chance: random.Random, d_head: int) -> dict[str, Any]:
    """What Qwen2 (biases) or Qwen3 (norms of queries and keys) has for itself, with M-RoPE."""
    ends = sorted(chance.sample(range(1, d_head // 2), 2))
    return {
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "parallel_attn_mlp": False,
        "mlp_bias": False,
        "qkv_bias": family == "qwen2" or chance.random() < 0.3,
        "qk_norm": family == "qwen3",
        "rope_parameters": {
            "rope_theta": SLOW,
            "mrope_section": [ends[0], ends[1] - ends[0], d_head // 2 - ends[1]],
            "mrope_interleaved": family == "qwen3",
        },
    }


def qwen_tower(family: str, chance: random.Random) -> tuple[VisionConfig, dict[str, Any]]:
    """A tower for images of any grid, and what its patch merger has for itself."""
    n_layers, side = chance.randint(2, 3), chance.choice([1, 2])
    fields: dict[str, Any] = {
        "act_fn": "quick_gelu",
        "normalization_type": "LN",
        "image_size": (PATCH * side, PATCH * side),
        "feature_layers": (n_layers,),
        "positions": "none",
    }
    if family == "qwen3":
        deep = sorted(chance.sample(range(1, n_layers + 1), 2))
        fields |= {
            "image_size": (PATCH * 3, PATCH * 3),
            "feature_layers": (n_layers, *deep),
            "positions": "bilinear",
            "patch_bias": True,
        }
    elif chance.random() < 0.5:  # Qwen2.5-VL
        kinds = ("global", *chance.choices(["global", "local"], k=n_layers - 1))
        fields |= {
            "act_fn": "silu",
            "normalization_type": "RMS",
            "gated_mlp": True,
            "window_size": 2,
            "attn_types": kinds[::-1],
        }
    vision = VisionConfig(
        n_layers=n_layers,
        d_model=chance.choice([20, 26]),
        d_head=4,
        select="full",
        class_token=False,
        pre_norm=False,
        packed=True,
        rotary_base=10000.0,
        merge_size=side,
        temporal_patch_size=chance.choice([1, 2]),
        **COMMON | fields,
    )
    merger = {
        "pixel_shuffle": side,
        "normalization_type": vision.normalization_type,
        "n_deepstack": len(vision.feature_layers) - 1,
    }
    return vision, merger
