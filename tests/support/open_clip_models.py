"""Random open_clip models of odd sizes, written as open_clip writes them to the hub.

Weights are scaled so that attention is far from uniform and every activation is of order 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from mmlens.checkpoints.towers.open_clip import load_tower
from mmlens.model.vision_tower import HookedVisionTransformer

WEIGHTS = "open_clip_model.safetensors"
TEXT = {"context_length": 5, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1}
PLAIN = {
    "image_size": 15,
    "patch_size": 5,
    "width": 21,
    "layers": 3,
    "head_width": 7,
    "mlp_ratio": 1.3,
}

# Fields of open_clip's `vision_cfg`, beside `PLAIN`.
OWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"head_width": 21},
    "not square": {"image_size": [20, 15]},
    "a strip left over": {"image_size": 18},
    "as in CLIPA": {
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "norm_kwargs": {"eps": 1e-3},
        "act_kwargs": {"approximate": "tanh"},
    },
    "layer scale": {"ls_init_value": 0.3},
    "as in CoCa": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "fixed positions": {"pos_embed_type": "sin_cos_2d", "width": 24, "head_width": 6},
    "patches dropped in training": {"patch_dropout": 0.5},
}

# Arguments of timm's `VisionTransformer`, as models that timm knows by name.
SMALL = {
    "img_size": 15,
    "patch_size": 5,
    "embed_dim": 21,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 1.7,
}
TIMM: dict[str, dict[str, Any]] = {
    "class token": {},
    "as in SigLIP": {"class_token": False, "global_pool": "map", "img_size": 18},
    "tanh": {"act_layer": "gelu_tanh", "class_token": False, "global_pool": "avg"},
    "as in CLIP": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": "layernorm"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "not square": {"img_size": (20, 15)},
    "any size": {"dynamic_img_size": True},
}
# What is refused: positions or parameters that a plain ViT does not have.
ODD_TIMM: dict[str, dict[str, Any]] = {
    "reg_token": {"reg_tokens": 2},
    "pos_embed is [1, 9": {"no_embed_class": True},
    "missing tensor visual.trunk.pos_embed": {"pos_embed": "none"},
    "q_norm": {"qk_norm": True},
    "attn.norm": {"scale_attn_norm": True},
    "mlp.norm": {"scale_mlp_norm": True},
    "ls1.gamma": {"init_values": 0.1},
    "ResPostBlock": {"block_fn": timm.models.vision_transformer.ResPostBlock, "init_values": 0.1},
    "norms of type": {"norm_layer": "rmsnorm"},
    "an activation": {"act_layer": "hard_swish"},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "5 x 3": {"patch_size": (5, 3)},
}
NAMES = [*OWN, *(f"timm: {name}" for name in TIMM)]


def register_with_timm(name: str, choices: dict[str, Any]) -> str:
    """Make a ViT known to timm."""

    def build(num_classes: int = 10, global_pool: str = "token", **unused: Any) -> TimmViT:
        given = {"num_classes": num_classes, "global_pool": global_pool}
        model = TimmViT(**(SMALL | given | choices))
        model.pretrained_cfg = model.default_cfg = {}
        return model

    build.__name__ = name
    timm.models.register_model(build)
    return name


TIMM_NAMES = {
    kind: register_with_timm(f"vit_of_a_test_{index}", choices)
    for index, (kind, choices) in enumerate((TIMM | ODD_TIMM).items())
}


def model_cfg(name: str, **more: Any) -> dict[str, Any]:
    """open_clip's configuration of one of the models above."""
    kind = name.removeprefix("timm: ")
    if kind == name:
        return {"embed_dim": 14, "vision_cfg": PLAIN | OWN[name], "text_cfg": TEXT} | more
    choices = SMALL | (TIMM | ODD_TIMM)[kind]
    vision = {
        "timm_model_name": TIMM_NAMES[kind],
        "timm_pool": choices.get("global_pool", "token"),
        "timm_proj": "none" if "global_pool" in choices else "linear",
        "image_size": choices["img_size"],
    }
    return {
        "embed_dim": 21,
        "vision_cfg": vision,
        "text_cfg": TEXT,
        "custom_text": True,
        "init_logit_bias": -10,
        **more,
    }


def random_clip(name: str, **more: Any) -> nn.Module:
    """open_clip's whole model with lively weights, drawn from torch's generator."""
    config = model_cfg(name, **more)
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    return enliven(kind(**config))


@torch.no_grad()
def enliven(model: nn.Module) -> nn.Module:
    """Redraw every weight, so that activations stay of order 1 and attention picks its keys."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) in norms:
            weight.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
        elif "embed" in name.rpartition(".")[2] or "token" in name:
            weight.normal_(std=0.5)
        elif weight.ndim < 2:
            weight.normal_(std=0.3)
        else:
            weight.normal_(std=1 / weight[0].numel() ** 0.5)
            if "in_proj" in name or "qkv" in name:  # larger queries and keys
                weight[: 2 * len(weight) // 3] *= 1.5
    return model.eval()


def tensors_of(clip: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}


def write(folder: Path, clip: nn.Module, config: dict[str, Any], **preprocess: Any) -> Path:
    """The folder that open_clip writes for the hub."""
    folder.mkdir(exist_ok=True)
    save_file(tensors_of(clip), folder / WEIGHTS, metadata={"format": "pt"})
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def load(name: str | Path, *args: Any, **options: Any) -> HookedVisionTransformer:
    return load_tower(name, *args, **{"device": "cpu", **options})


@torch.no_grad()
def reference(visual: Any, pixels: Tensor) -> list[Tensor]:
    """The stream that enters open_clip's first block, and what leaves each block."""
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    streams: list[Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda _, given: streams.append(given[0]))]
    for block in blocks:
        handles.append(block.register_forward_hook(lambda _, given, out: streams.append(out)))
    visual(pixels)
    for handle in handles:
        handle.remove()
    return streams


def random_pixels(visual: Any) -> Tensor:
    size = visual.image_size
    return torch.randn(3, 3, *((size, size) if isinstance(size, int) else size))


def make_known(folder: Path) -> tuple[str, nn.Module]:
    """A random model that open_clip knows by the name that is returned."""
    (folder / "ViT-mmlens-odd.json").write_text(json.dumps(model_cfg("plain")))
    open_clip.add_model_config(folder / "ViT-mmlens-odd.json")
    return "ViT-mmlens-odd", random_clip("plain")
