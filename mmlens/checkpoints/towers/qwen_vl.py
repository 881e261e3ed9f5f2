"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and the patch mergers after them.

| | norms | MLP | attention | positions | merger |
|---|---|---|---|---|---|
| Qwen2-VL | LayerNorm | plain | whole image | 2-D rotary | one |
| Qwen2.5-VL | RMSNorm | gated | windows, and some layers whole | 2-D rotary | one |
| Qwen3-VL | LayerNorm | plain | whole image | 2-D rotary, and learnt ones | one, and deepstack's |

Source: transformers, `configuration_*.py` and the vision models of `modeling_*.py` in
`models/qwen2_vl`, `models/qwen2_5_vl` and `models/qwen3_vl`.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hf_configs import known_activation
from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig

EPS = 1e-6  # of every norm; no configuration says it


def tower_config(hf: PreTrainedConfig) -> VisionConfig:
    """Return a tower's configuration in our terms.

    Args:
        hf: transformers' vision configuration of one of the three.

    Raises:
        CheckpointError: another tower, or sizes that do not fit together.
    """
    if hf.model_type not in READERS:
        raise CheckpointError(f"a {hf.model_type!r} tower; supported are {', '.join(READERS)}")
    own = READERS[hf.model_type](hf)
    side, merge = one_size(hf, "patch_size"), hf.spatial_merge_size
    rope = getattr(hf, "rope_parameters", None) or {}  # transformers 5.9 has none
    if rope.get("rope_type", "axial") != "axial":
        raise CheckpointError(f"the tower's rope_type is {rope['rope_type']!r}; it must be 'axial'")
    if merge < 1 or own["d_model"] % hf.num_heads or own["d_model"] // hf.num_heads % 4:
        raise CheckpointError(
            f"a tower of {own['d_model']} dimensions and {hf.num_heads} heads, whose squares have "
            f"{merge} patches a side; heads must have a multiple of 4 dimensions, and squares 1 "
            "patch or more"
        )
    common: dict[str, Any] = {
        "n_layers": hf.depth,
        "n_heads": hf.num_heads,
        "d_head": own["d_model"] // hf.num_heads,
        "act_fn": known_activation(hf.hidden_act, "vision_config.hidden_act"),
        "normalization_type": "LN",
        "eps": EPS,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "image_size": (side * merge, side * merge),
        "patch_size": side,
        "n_channels": hf.in_channels,
        "temporal_patch_size": one_size(hf, "temporal_patch_size"),
        "merge_size": merge,
        "rotary_base": rope.get("rope_theta", 10000.0),
        "positions": "none",
        "packed": True,
        "feature_layers": (hf.depth,),
        "select": "full",
        "class_token": False,
        "pre_norm": False,
    }
    return VisionConfig(**(common | own))


def merger_config(vision: VisionConfig, hf: PreTrainedConfig, d_model: int) -> ProjectorConfig:
    """Return the configuration of the patch merger, and of deepstack's.

    Args:
        vision: of the tower, by `tower_config`.
        hf: what that was read from.
        d_model: of the decoder.

    Raises:
        CheckpointError: the merger gives the decoder another number of dimensions.
    """
    d_out = (
        hf.hidden_size
        if hf.model_type == "qwen2_vl_vision"
        else getattr(hf, "out_hidden_size", None)
    )
    if d_out != d_model:
        raise CheckpointError(
            f"the patch merger makes {d_out} dimensions, but the decoder has {d_model}"
        )
    return ProjectorConfig(
        d_in=vision.d_model,
        d_hidden=vision.d_model * vision.merge_size**2,
        d_out=d_model,
        pixel_shuffle=vision.merge_size,
        normalization_type=vision.normalization_type,
        eps=EPS,
        n_deepstack=len(vision.feature_layers) - 1,
    )


def qwen2(hf: Any) -> dict[str, Any]:
    """Return what Qwen2-VL's tower has for itself."""
    return {"d_model": hf.embed_dim, "d_mlp": int(hf.embed_dim * hf.mlp_ratio)}


def qwen2_5(hf: Any) -> dict[str, Any]:
    """Return what Qwen2.5-VL's tower has for itself.

    Raises:
        CheckpointError: windows smaller than a square of patches.
    """
    merge, whole = hf.spatial_merge_size, set(hf.fullatt_block_indexes)
    squares = hf.window_size // merge // one_size(hf, "patch_size")
    if squares < 1:
        raise CheckpointError(
            f"window_size is {hf.window_size} pixels, less than {merge} patches of "
            f"{hf.patch_size} pixels"
        )
    return {
        "d_model": hf.hidden_size,
        "d_mlp": hf.intermediate_size,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "window_size": squares * merge,
        "attn_types": tuple("global" if n in whole else "local" for n in range(hf.depth)),
    }


def qwen3(hf: Any) -> dict[str, Any]:
    """Return what Qwen3-VL's tower has for itself.

    Raises:
        CheckpointError: positions that are no square, or deepstack's layers out of order.
    """
    side, deepstack = isqrt(hf.num_position_embeddings), tuple(hf.deepstack_visual_indexes)
    if side**2 != hf.num_position_embeddings or side < 1:
        raise CheckpointError(
            f"num_position_embeddings is {hf.num_position_embeddings}; positions must be a square"
        )
    if list(deepstack) != sorted(set(deepstack) & set(range(hf.depth))):
        raise CheckpointError(
            f"deepstack_visual_indexes are {list(deepstack)}; they must ascend, from 0 to "
            f"{hf.depth - 1}"
        )
    size = side * one_size(hf, "patch_size")
    return {
        "d_model": hf.hidden_size,
        "d_mlp": hf.intermediate_size,
        "image_size": (size, size),
        "positions": "bilinear",
        "patch_bias": True,
        "feature_layers": (hf.depth, *(layer + 1 for layer in deepstack)),
    }


READERS = {
    "qwen2_vl_vision": qwen2,
    "qwen2_5_vl_vision": qwen2_5,
    "qwen3_vl_vision": qwen3,
    "qwen3_vl": qwen3,  # in published files, which transformers 5.9 leaves as they are
}


def one_size(hf: Any, name: str) -> int:
    """Return a size that may be written as a list of equal numbers.

    Raises:
        CheckpointError: they differ.
    """
    value = getattr(hf, name)
    sizes = {value} if isinstance(value, int) else set(value)
    if len(sizes) != 1:
        raise CheckpointError(f"{name} is {value}; both sides must be equal")
    return sizes.pop()


BLOCKS = {
    "patch_embed.proj": "vision.patch_embed",
    "blocks.{}.norm1": "vision.blocks.{}.ln1",
    "blocks.{}.attn.qkv": "vision.blocks.{}.attn.qkv",
    "blocks.{}.attn.proj": "vision.blocks.{}.attn.o",
    "blocks.{}.norm2": "vision.blocks.{}.ln2",
}
MERGER = {
    "merger.ln_q": "projector.ln",
    "merger.mlp.0": "projector.linear_1",
    "merger.mlp.2": "projector.linear_2",
}
QWEN2_TOWER = {
    **BLOCKS,
    "blocks.{}.mlp.fc1": "vision.blocks.{}.mlp.up",
    "blocks.{}.mlp.fc2": "vision.blocks.{}.mlp.down",
    **MERGER,
}
QWEN2_5_TOWER = {
    **BLOCKS,
    "blocks.{}.mlp.gate_proj": "vision.blocks.{}.mlp.gate",
    "blocks.{}.mlp.up_proj": "vision.blocks.{}.mlp.up",
    "blocks.{}.mlp.down_proj": "vision.blocks.{}.mlp.down",
    **MERGER,
}


def qwen3_tower(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the names of Qwen3-VL's tower and mergers."""
    n_deepstack = cfg.projector.n_deepstack if cfg.projector else 0
    mergers = {"merger": "projector"} | {
        f"deepstack_merger_list.{i}": f"projector.deepstack.{i}" for i in range(n_deepstack)
    }
    parts = {"norm": "ln", "linear_fc1": "linear_1", "linear_fc2": "linear_2"}
    return {
        **BLOCKS,
        "pos_embed.weight": "vision.W_pos",
        "blocks.{}.mlp.linear_fc1": "vision.blocks.{}.mlp.up",
        "blocks.{}.mlp.linear_fc2": "vision.blocks.{}.mlp.down",
        **{
            f"{merger}.{part}": f"{here}.{ours}"
            for merger, here in mergers.items()
            for part, ours in parts.items()
        },
    }
