"""The configuration of an open_clip image tower, read off open_clip's own modules.

The tower is built by open_clip itself, on the meta device: so every choice of `CLIPVisionCfg`, and
of timm after it, arrives here as open_clip understands it. What is no plain ViT is refused.

Source: open_clip, `model.py` (`CLIPVisionCfg`), `transformer.py` (`VisionTransformer`) and
`timm_model.py`; timm, `models/vision_transformer.py`, whose ViTs SigLIP and others take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hf_configs import feature_layers
from mmlens.checkpoints.loader import Weights, check
from mmlens.checkpoints.names import Table, slots, under
from mmlens.config import VisionConfig
from mmlens.inputs.image_files import one_line
from mmlens.model.vision_tower import HookedVisionTransformer

NAMES = {
    "class_embedding": "vision.class_embed",
    "conv1": "vision.patch_embed",
    "positional_embedding": "vision.W_pos",
    "ln_pre": "vision.ln_pre",
    "transformer.resblocks.{}.ln_1": "vision.blocks.{}.ln1",
    "transformer.resblocks.{}.attn.in_proj_weight": "vision.blocks.{}.attn.qkv.weight",
    "transformer.resblocks.{}.attn.in_proj_bias": "vision.blocks.{}.attn.qkv.bias",
    "transformer.resblocks.{}.attn.out_proj": "vision.blocks.{}.attn.o",
    "transformer.resblocks.{}.ls_1.gamma": "vision.blocks.{}.ls_1",
    "transformer.resblocks.{}.ln_2": "vision.blocks.{}.ln2",
    "transformer.resblocks.{}.mlp.c_fc": "vision.blocks.{}.mlp.up",
    "transformer.resblocks.{}.mlp.c_proj": "vision.blocks.{}.mlp.down",
    "transformer.resblocks.{}.ls_2.gamma": "vision.blocks.{}.ls_2",
}
TIMM_NAMES = {
    "trunk.cls_token": "vision.class_embed[None, None]",
    "trunk.patch_embed.proj": "vision.patch_embed",
    "trunk.pos_embed": "vision.W_pos[None]",
    "trunk.norm_pre": "vision.ln_pre",
    "trunk.blocks.{}.norm1": "vision.blocks.{}.ln1",
    "trunk.blocks.{}.attn.qkv": "vision.blocks.{}.attn.qkv",
    "trunk.blocks.{}.attn.proj": "vision.blocks.{}.attn.o",
    "trunk.blocks.{}.norm2": "vision.blocks.{}.ln2",
    "trunk.blocks.{}.mlp.fc1": "vision.blocks.{}.mlp.up",
    "trunk.blocks.{}.mlp.fc2": "vision.blocks.{}.mlp.down",
}
# What stands after the blocks, which compares images with texts; and blocks after the last
# feature layer.
IGNORED = (
    r"visual\.(ln_post|attn_pool\w*)\..*",
    r"visual\.proj",
    r"visual\.transformer\.resblocks\.\d+\.(ln_\d|attn\.out_proj|mlp\.c_\w+)\.(weight|bias)",
    r"visual\.transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias)",
    r"visual\.(head|trunk\.(norm|fc_norm|attn_pool|head))\..*",
    r"visual\.trunk\.blocks\.\d+\.(norm\d|attn\.(qkv|proj)|mlp\.fc\d)\.(weight|bias)",
)
LAYER_SCALE = r"visual\.transformer\.resblocks\.\d+\.ls_\d\.gamma"
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


def vision_config(
    model_cfg: dict[str, Any], feature_layer: int | Sequence[int], select: Any
) -> VisionConfig:
    """Return the part of a tower that is built; see `hf_configs.vision_config` for the arguments.

    Args:
        model_cfg: open_clip's own, with `embed_dim`, `vision_cfg` and perhaps `quick_gelu`.

    Raises:
        CheckpointError: the tower is no plain ViT, or has no such layer.
    """
    visual = image_tower(model_cfg)
    fields = timm_fields(visual) if is_timm(model_cfg) else open_clip_fields(visual)
    layers = feature_layers(fields.pop("n_layers"), feature_layer, select)
    cfg = VisionConfig(
        n_layers=max(layers),
        normalization_type="LN",
        image_size=pair(visual.image_size),
        feature_layers=layers,
        select=select,
        **fields,
    )
    with torch.device("meta"):
        ours = nn.ModuleDict({"vision": HookedVisionTransformer(cfg)})
    shapes = {f"visual.{name}": tensor.shape for name, tensor in visual.state_dict().items()}
    try:
        check(ours, shapes, Weights([], table(model_cfg, cfg), ignored(model_cfg)))
    except CheckpointError as error:  # register tokens, norms within attention ...
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise unsupported(f"other parameters than a plain ViT ({first} ...)") from None
    return cfg


def ignored(model_cfg: dict[str, Any]) -> tuple[str, ...]:
    """Patterns of the tower's tensors that a language model gets nothing of."""
    has_layer_scale = model_cfg["vision_cfg"].get("ls_init_value") is not None
    return (*IGNORED, LAYER_SCALE) if has_layer_scale else IGNORED


def table(model_cfg: dict[str, Any], cfg: VisionConfig, prefix: str = "visual.") -> Table:
    """Every tensor that is used, and where it goes."""
    return slots(cfg, under(prefix, TIMM_NAMES if is_timm(model_cfg) else NAMES))


def is_timm(model_cfg: dict[str, Any]) -> bool:
    """Whether the tower is one of timm's."""
    return bool(model_cfg["vision_cfg"].get("timm_model_name"))


def image_tower(model_cfg: dict[str, Any]) -> Any:
    """Return open_clip's image tower, without weights."""
    from open_clip.model import CLIP, CLIPTextCfg  # imports torchvision and timm: slow

    try:
        vision = model_cfg["vision_cfg"] | {"timm_model_pretrained": False}
        with torch.device("meta"):
            clip = CLIP(
                embed_dim=model_cfg["embed_dim"],
                vision_cfg=vision,
                text_cfg=CLIPTextCfg(layers=1),  # goes unused
                quick_gelu=bool(model_cfg.get("quick_gelu")),
            )
    except Exception as error:  # whatever comes out of open_clip and timm
        raise CheckpointError(
            f"open_clip cannot build the image tower that the config describes: {one_line(error)}"
        ) from error
    return clip.visual


def open_clip_fields(visual: Any) -> dict[str, Any]:
    """Return `VisionConfig` fields of open_clip's own `VisionTransformer`."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    require(visual, VisionTransformer)
    blocks = visual.transformer.resblocks
    for block in blocks:
        require(block, ResidualAttentionBlock)
    block = blocks[0]
    return {
        "n_layers": len(blocks),
        "d_model": block.attn.embed_dim,
        "n_heads": block.attn.num_heads,
        "d_head": block.attn.head_dim,
        "d_mlp": block.mlp.c_fc.out_features,
        "act_fn": activation_name(block.mlp.gelu),
        "eps": epsilon(block.ln_1),
        "layer_scale": not isinstance(block.ls_1, nn.Identity),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "patch_size": patch_size(visual.conv1),
        "pre_norm": not isinstance(visual.ln_pre, nn.Identity),
    }


def timm_fields(visual: Any) -> dict[str, Any]:
    """Return `VisionConfig` fields of timm's `VisionTransformer`."""
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    trunk = visual.trunk
    require(trunk, VisionTransformer)
    require(trunk.patch_embed, PatchEmbed)
    for block in trunk.blocks:
        require(block, Block)
        require(block.attn, Attention)
        require(block.mlp, Mlp)
    size = trunk.patch_embed.img_size
    if trunk.patch_embed.dynamic_img_pad or pair(size) != pair(visual.image_size):
        raise unsupported(f"images of {visual.image_size}, for a model of {size}, or padded ones")
    block = trunk.blocks[0]
    return {
        "n_layers": len(trunk.blocks),
        "d_model": trunk.embed_dim,
        "n_heads": block.attn.num_heads,
        "d_head": block.attn.head_dim,
        "d_mlp": block.mlp.fc1.out_features,
        "act_fn": activation_name(block.mlp.act),
        "eps": epsilon(block.norm1),
        "qkv_bias": block.attn.qkv.bias is not None,
        "o_bias": block.attn.proj.bias is not None,
        "mlp_bias": block.mlp.fc1.bias is not None,
        "patch_size": patch_size(trunk.patch_embed.proj),
        "patch_bias": trunk.patch_embed.proj.bias is not None,
        "class_token": trunk.cls_token is not None,
        "pre_norm": not isinstance(trunk.norm_pre, nn.Identity),
    }


def activation_name(module: nn.Module) -> str:
    """The name that transformers has for an activation, found by what it computes."""
    probe = torch.linspace(-4, 4, 81, dtype=torch.float64)
    value = module(probe)
    for name in ACTIVATIONS:
        if torch.allclose(value, ACT2FN[name](probe), rtol=0, atol=1e-9):
            return name
    raise unsupported(f"an activation {module}")


def epsilon(norm: nn.Module) -> float:
    """What a LayerNorm adds to the variance."""
    if not isinstance(norm, nn.LayerNorm):
        raise unsupported(f"norms of type {type(norm).__name__}")
    return norm.eps


def patch_size(convolution: nn.Conv2d) -> int:
    """The side of a patch in pixels."""
    height, width = convolution.kernel_size
    if height != width:
        raise unsupported(f"patches of {height} x {width} pixels")
    return height


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def require(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise a CheckpointError unless the module is exactly of that kind."""
    if type(module) is not kind:
        raise unsupported(f"{type(module).__name__} where a plain ViT has its {kind.__name__}")


def unsupported(what: str) -> CheckpointError:
    """The error for a tower that is not built here."""
    return CheckpointError(
        f"an open_clip tower with {what}; supported are plain vision transformers, open_clip's own "
        "and timm's (CLIP, SigLIP)"
    )
