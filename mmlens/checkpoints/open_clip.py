"""Towers in open_clip's form: the image tower of an open_clip CLIP, and open_clip's preprocessing.

The configuration is open_clip's own json: `model_cfg.vision_cfg` and `preprocess_cfg`. Names are in
`names.open_clip_tower_names`. Source: open_clip, `model.py` (`CLIPVisionCfg`), `transformer.py`
(`VisionTransformer`) and `transform.py` (`PreprocessCfg`, `image_transform_v2`).
"""

from __future__ import annotations

from typing import Any

from mmlens.checkpoints.errors import CheckpointError
from mmlens.config import VisionConfig

# The class token's way out: CLIP compares it with texts, a language model does not get it.
IGNORED = (r"visual\.ln_post\..*", r"visual\.proj", r"logit_scale")

# Choices of CLIPVisionCfg that change the computation and are not built here.
UNSUPPORTED = (
    "timm_model_name",
    "attentional_pool",
    "ls_init_value",
    "no_ln_pre",
    "input_patchnorm",
)


def vision_config(model_cfg: dict[str, Any], feature_layer: int, select: Any) -> VisionConfig:
    """The tower's configuration.

    Args:
        model_cfg: open_clip's `model_cfg`.
        feature_layer: 0 is the input of the first block, -1 the output of the last.
        select: "default" drops the class token, "full" keeps it.

    Raises:
        CheckpointError: the tower is no plain ViT with a class token.
    """
    vision = model_cfg["vision_cfg"]
    odd = [name for name in UNSUPPORTED if vision.get(name)]
    if odd or not isinstance(vision["layers"], int):
        raise CheckpointError(
            f"an open_clip tower with {', '.join(odd) or 'ResNet stages'}; only plain ViTs are "
            "known"
        )
    size = vision.get("image_size", 224)
    width, layers = vision["width"], vision["layers"]
    d_head = vision.get("head_width", 64)
    layer = feature_layer + layers + 1 if feature_layer < 0 else feature_layer
    return VisionConfig(
        n_layers=layer,
        d_model=width,
        n_heads=width // d_head,
        d_head=d_head,
        d_mlp=int(width * vision.get("mlp_ratio", 4.0)),
        act_fn="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        normalization_type="LN",
        eps=1e-5,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_size=vision["patch_size"],
        feature_layers=(layer,),
        select=select,
    )


def image_transform(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> Any:
    """open_clip's own transform for inference: PIL image to [channel, height, width]."""
    from open_clip.transform import PreprocessCfg, image_transform_v2  # imports torchvision: slow

    size = preprocess_cfg.get("size") or model_cfg["vision_cfg"].get("image_size", 224)
    fields = {name: value for name, value in preprocess_cfg.items() if name != "size"}
    return image_transform_v2(PreprocessCfg(size=size, **fields), is_train=False)
